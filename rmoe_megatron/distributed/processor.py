"""Whether this machine's processor multiplies bf16 faster than fp32: by its instructions, confirmed by one product that is timed.

A processor with AVX512-BF16 or AMX multiplies bf16 two to five times as fast as fp32. One without emulates it, 6 to 80 times
slower. PyTorch's libraries can be told to leave the instructions unused (``ONEDNN_MAX_CPU_ISA``), which only the product shows.
"""

import functools
import platform
import time
from typing import NamedTuple

import torch

# Of the timed product: large enough to run at the processor's rate, small enough to take half a second where it is slowest.
ROWS, WIDTH, REPEATS = 512, 384, 5
ROUNDS = 4


class ProductSeconds(NamedTuple):
    """What one matrix product takes, in seconds."""

    fp32: float
    bf16: float


def bf16_instructions() -> tuple[str, ...]:
    """Return the names of the processor's instructions for bf16 products; empty if it has none."""
    capabilities = torch.cpu.get_capabilities()
    return tuple(sorted(name for name, has in capabilities.items() if "bf16" in name and has is True))


@functools.cache
def product_seconds() -> ProductSeconds:
    """Time the same product in both data types, once a process: the fastest of a few repeats each.

    Where the processor has instructions for bf16 and they seem not to pay, the measurement is taken up to four times: another process may
    have been busy in one of the moments.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, WIDTH, generator=generator) for size in (ROWS, WIDTH))
    best = ProductSeconds(float("inf"), float("inf"))
    for _ in range(ROUNDS if bf16_instructions() else 1):
        found = (_fastest(left.to(dtype), right.to(dtype)) for dtype in (torch.float32, torch.bfloat16))
        best = ProductSeconds(*map(min, best, found))
        if best.bf16 < best.fp32:
            break
    return best


def bf16_is_fast() -> bool:
    """Return whether the processor has instructions for bf16 products and they are used: a product then takes less time."""
    return bool(bf16_instructions()) and product_seconds().bf16 < product_seconds().fp32


def describe_processor(device: torch.device) -> str:
    """Return the name of ``device`` for a table of figures, of a CPU with its instructions for bf16 and whether they pay."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or "CPU"
    return f"{name} ({describe_bf16()})"


def describe_bf16() -> str:
    """Return what the processor makes of bf16, as ``bf16 by avx512_bf16, 0.49 of fp32's time``."""
    instructions, seconds = bf16_instructions(), product_seconds()
    by = f"by {', '.join(instructions)}" if instructions else "without instructions for it"
    return f"bf16 {by}, {seconds.bf16 / seconds.fp32:.2g} of fp32's time"


def _fastest(left: torch.Tensor, right: torch.Tensor) -> float:
    seconds = []
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        torch.nn.functional.linear(left, right)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])
