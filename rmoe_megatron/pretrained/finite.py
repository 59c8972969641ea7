"""Numbers that are none: what every conversion to another data type is followed by."""

from collections.abc import Iterable

from torch import Tensor

from rmoe_megatron.errors import UserError


def require_finite(tensors: Iterable[tuple[str, Tensor]], where: str, dtype: str) -> None:
    """Check that weights are numbers after they were converted to a data type.

    float16 ends at 65504, beyond which values become infinite; bfloat16 and float32 go to 3e38.

    Args:
        tensors: with their names.
        where: they are from, for the message.
        dtype: as the command line calls it, for the message.

    Raises:
        UserError: one is infinite or not a number; names the first.
    """
    for name, tensor in tensors:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            wrong = int((~tensor.isfinite()).sum())
            raise UserError(
                f"{where} has {wrong} values in {name} that are not finite in {dtype}; choose another --dtype (fp16 ends at 65504), "
                "or other weights if they are not finite in any."
            )
