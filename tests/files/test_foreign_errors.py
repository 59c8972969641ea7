"""What other libraries raise becomes a sentence, but for what is no fault of a file."""

import pytest
import torch

from rmoe_megatron.errors import UserError
from rmoe_megatron.files.foreign_errors import refusal


def test_an_exception_is_a_sentence() -> None:
    with (
        pytest.raises(UserError, match=r"^The file cannot be loaded \(KeyError: 'width'\)\.$"),
        refusal("The file cannot be loaded"),
    ):
        raise KeyError("width")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), SystemExit(3), KeyboardInterrupt()]
)
def test_the_end_of_memory_or_of_the_process_is_no_fault_of_a_file(error: BaseException) -> None:
    with pytest.raises(type(error)), refusal("The file cannot be loaded"):
        raise error
