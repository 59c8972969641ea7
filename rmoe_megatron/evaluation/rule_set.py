"""Which rules a benchmark is judged by."""

from enum import Enum


class RuleSet(Enum):
    """The rules of the published code with its quirks (official), or with the quirks repaired (fixed)."""

    official = "official"
    fixed = "fixed"
