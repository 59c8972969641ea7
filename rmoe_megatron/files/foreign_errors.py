"""What other libraries raise on files that are not what they should be, as one sentence for the user."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rmoe_megatron.errors import UserError

MAX_REASON = 200  # characters of another library's reason


@contextmanager
def refusal(action: str) -> Iterator[None]:
    """Turn whatever another library raises into a UserError with the first sentence of its reason.

    Args:
        action: the beginning of the message, like ``FOLDER cannot be loaded``.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit, torch.OutOfMemoryError):
        raise
    except BaseException as error:  # a panic of the tokenizers' Rust code is no Exception
        raise UserError(f"{action} ({reason(error)}).") from error


def reason(error: BaseException) -> str:
    """Return the first sentence of an exception's message, with the type's name unless it says enough."""
    text = " ".join(str(error).split()).partition(". ")[0].rstrip(".")[:MAX_REASON]
    if isinstance(error, ValueError | OSError | RuntimeError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
