"""Numbers that are none: every conversion to another data type is followed by this check."""

from collections.abc import Iterable

from torch import Tensor

from rmoe_megatron.errors import UserError


def require_finite(tensors: Iterable[tuple[str, Tensor]], where: str, dtype: str, remedy: str) -> None:
    """Check that values are numbers after they were converted to a data type.

    float16 ends at 65504, beyond which values become infinite; bfloat16 and float32 go to 3e38.

    Args:
        tensors: with their names.
        where: they are in, for the message.
        dtype: they were converted to, for the message.
        remedy: what to do about it, for the message.

    Raises:
        UserError: one is infinite or not a number; names the first tensor.
    """
    for name, tensor in tensors:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            wrong = int((~tensor.isfinite()).sum())
            raise UserError(f"{where} has {wrong} values in {name} that are not finite in {dtype}; {remedy}.")
