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


def require_blocks(name: str, layers: list[int], num_layers: int, may_be_empty: bool = False) -> None:
    """Raise a UserError unless ``layers`` are blocks of a model of ``num_layers``, each named once."""
    require(
        may_be_empty or len(layers) > 0,
        f"{name} is empty; name at least one block or set {name.partition('.')[0]}=null.",
    )
    require(len(set(layers)) == len(layers), f"{name} {layers} names a block twice.")
    for layer in layers:
        require(
            0 <= layer < num_layers,
            f"{name} names block {layer}, but blocks are numbered 0 to {num_layers - 1}.",
        )
