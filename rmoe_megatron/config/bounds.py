"""What a value of the configuration may be, said where the value is declared and checked in one place.

A bound keeps out what no run can mean (not finite, negative) and what one mistyped digit would cost in memory and time.
"""

import math
import unicodedata
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any, get_args, get_type_hints

from rmoe_megatron.errors import UserError

# OmegaConf's mark of a value that has to be given, written out: sampling reads the schema without OmegaConf.
MISSING: Any = "???"
_BOUNDS = "bounds"


@dataclass(frozen=True)
class Bounds:
    """An interval of finite numbers; ``above`` and ``below`` leave their ends out."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    why: str = ""

    def allow(self, value: float) -> bool:
        """Whether ``value`` is a finite number of the interval."""
        inside = self.least <= value <= self.most and self.above < value < self.below
        return inside and math.isfinite(value)

    def __str__(self) -> str:
        lower = f"at least {self.least}" if self.least > -math.inf else f"greater than {self.above}"
        upper = f"at most {self.most}" if self.most < math.inf else f"less than {self.below}"
        return f"{lower} and {upper}{f' ({self.why})' if self.why else ''}"


def number(
    default: Any,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    why: str = "",
) -> Any:
    """Declare a numeric field of a configuration dataclass with what it may be; ``why`` explains a bound to its user."""
    bounds = Bounds(least, most, above, below, why)
    return field(default=default, metadata={_BOUNDS: bounds})


def bounds_of(section: Any, name: str) -> Bounds | None:
    """Return the bounds of a field of a configuration dataclass (or its class), None if it declares none."""
    return next(each.metadata.get(_BOUNDS) for each in fields(section) if each.name == name)


def check_bounds(section: Any, prefix: str = "") -> None:
    """Check numbers and texts of a configuration dataclass and of its sections.

    Raises:
        UserError: names the key, the value and what is allowed.
    """
    for each in fields(section):
        key, value = f"{prefix}{each.name}", getattr(section, each.name)
        if is_dataclass(value):
            check_bounds(value, f"{key}.")
        elif isinstance(value, str):
            _check_text(key, value)
        elif isinstance(value, list):
            _check_entries(key, value, *get_args(get_type_hints(type(section))[each.name]))
        elif isinstance(value, int | float) and not isinstance(value, bool | Enum):
            bounds = each.metadata[_BOUNDS]
            if not bounds.allow(value):
                raise UserError(f"{key} must be {bounds}, it is {_shown(value)}.")


def _check_entries(key: str, values: list[Any], kind: type) -> None:
    """Check a list whose entries OmegaConf has not compared with their type."""
    for place, value in enumerate(values):
        if is_dataclass(value):
            check_bounds(value, f"{key}[{place}].")
            continue
        if type(value) is not kind:
            raise UserError(
                f"{key} has the entry {value!r:.60}, which is no {kind.__name__}; write one instead."
            )
        if isinstance(value, str):
            _check_text(key, value, may_be_empty=True)


def _check_text(key: str, value: str, may_be_empty: bool = False) -> None:
    if any(
        unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t" for character in value
    ):
        raise UserError(f"{key} has a control character in {value[:60]!r}; leave it out.")
    if not value.strip() and not may_be_empty:
        raise UserError(f"{key} is empty; give it a value or leave it out.")


def _shown(value: float) -> str:
    """Return the number as text; Python refuses to write integers of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    return str(value)
