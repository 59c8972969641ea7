"""One sentence for a condition that does not hold."""

from rmoe_megatron.errors import UserError


def require(condition: bool, message: str) -> None:
    """Raise a UserError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)


def require_divides(divisor: int, divisor_name: str, number: int, number_name: str) -> None:
    """Raise a UserError that names both numbers unless ``divisor`` divides ``number``."""
    require(
        number % divisor == 0, f"{number_name} ({number}) is not divisible by {divisor_name} ({divisor})."
    )
