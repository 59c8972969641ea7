"""What is said of the processor: its instructions for bf16, and whether products in bf16 are the faster ones."""

from pathlib import Path

import pytest
import torch

from rmoe_megatron.distributed import processor
from rmoe_megatron.distributed.processor import (
    ProductSeconds,
    bf16_instructions,
    bf16_is_fast,
    product_seconds,
)


def test_instructions_are_those_of_the_kernel() -> None:
    """Linux lists them in another place than PyTorch asks."""
    if not Path("/proc/cpuinfo").exists() or "flags" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("no x86 processor under Linux")
    flags = next(
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")
    ).split()
    assert set(bf16_instructions()) == {"avx512_bf16", "amx_bf16"} & set(flags)


@pytest.mark.parametrize(
    ("instructions", "seconds", "expected"),
    [
        (("avx512_bf16",), ProductSeconds(fp32=2.0, bf16=1.0), True),
        (("avx512_bf16",), ProductSeconds(fp32=1.0, bf16=6.0), False),  # they are there and left unused
        ((), ProductSeconds(fp32=1.0, bf16=28.0), False),
        ((), ProductSeconds(fp32=1.0, bf16=0.9), False),  # a busy moment is no instruction
    ],
)
def test_bf16_is_fast_where_both_say_so(
    monkeypatch: pytest.MonkeyPatch, instructions: tuple[str, ...], seconds: ProductSeconds, expected: bool
) -> None:
    monkeypatch.setattr(processor, "bf16_instructions", lambda: instructions)
    monkeypatch.setattr(processor, "product_seconds", lambda: seconds)
    assert bf16_is_fast() is expected


def test_a_product_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    product_seconds.cache_clear()
    monkeypatch.setattr(processor, "bf16_instructions", lambda: ())
    asked: list[torch.dtype] = []
    linear = torch.nn.functional.linear

    def counted(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        asked.append(left.dtype)
        return linear(left, right)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    first = product_seconds()
    assert product_seconds() is first
    assert asked == [torch.float32] * 6 + [torch.bfloat16] * 6
    assert min(first) > 0


def test_a_busy_moment_does_not_hide_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process takes the cores while bf16 is timed for the first time; the second time it is as fast as it can be."""
    product_seconds.cache_clear()
    times = iter([1.0, 5.0, 1.5, 0.5])
    monkeypatch.setattr(processor, "bf16_instructions", lambda: ("avx512_bf16",))
    monkeypatch.setattr(processor, "_fastest", lambda left, right: next(times))
    try:
        assert product_seconds() == ProductSeconds(fp32=1.0, bf16=0.5)
        assert bf16_is_fast()
    finally:
        product_seconds.cache_clear()
