"""Which rules a benchmark is judged by."""

from enum import Enum


class Protocol(Enum):
    """Those of the published code with its quirks, or repaired."""

    official = "official"
    fixed = "fixed"
