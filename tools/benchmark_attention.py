"""Times attention's two ways, forward and backward, by size and data type; prints a table and what the rule would take.

    python tools/benchmark_attention.py [--repeats 9]

On a CPU ``ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2`` before the command hold a newer
processor to an older one's instructions. The rule is :func:`rmoe_megatron.model.softmax_attention.way_to_attend`.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from rmoe_megatron.config.run import Device
from rmoe_megatron.distributed.device import select_device, synchronize
from rmoe_megatron.distributed.processor import bf16_is_fast, describe_processor
from rmoe_megatron.model.softmax_attention import attend_by_products, attend_fused, way_to_attend

# Samples, heads, tokens and head size: what the toys, a DiT-B and an SD3-medium attend with.
SIZES = [(32, 6, 32, 32), (32, 6, 80, 32), (64, 8, 80, 48), (8, 8, 192, 64), (8, 8, 256, 64), (4, 12, 333, 64), (1, 12, 1101, 64)]  # fmt: skip
WARM_UP = 3


def seconds(attend: Callable[..., Tensor], parts: list[Tensor]) -> float:
    """Return the time of one forward and backward pass."""
    synchronize(parts[0].device)
    started = time.perf_counter()
    output = attend(*parts)
    torch.autograd.grad(output, parts, torch.ones_like(output))
    synchronize(parts[0].device)
    return time.perf_counter() - started


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    device = select_device(Device.auto)
    print(f"{describe_processor(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(
        "| batch x heads, tokens, head | precision | fused ms | products ms | the rule takes |\n|---|---|---|---|---|"
    )
    for batch, heads, tokens, head_dim in tqdm(SIZES, desc="sizes", unit="size"):
        for dtype in (torch.bfloat16, torch.float32):
            size = (tokens, batch, heads, head_dim)
            parts = [torch.randn(size, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
            # In turns, so that a slow moment slows both.
            rounds = [
                [seconds(attend, parts) for attend in (attend_fused, attend_by_products)]
                for _ in range(WARM_UP + arguments.repeats)
            ]
            fused, products = (
                1e3 * statistics.median(values) for values in zip(*rounds[WARM_UP:], strict=True)
            )
            rows = tokens * batch * heads
            way = way_to_attend(device, dtype, rows, tokens, bf16_is_fast())
            print(
                f"| {batch * heads}, {tokens}, {head_dim} | {str(dtype)[6:]} | {fused:.1f} | {products:.1f} | {way.value} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
