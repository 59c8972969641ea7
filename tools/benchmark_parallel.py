"""Memory and time of a training step under both engines, at equal work, in turns.

    torchrun --nproc-per-node 2 tools/benchmark_parallel.py [CONFIG [KEY=VALUE ...]] [--engine both] [--repeats 5] [--record engine]

*Held* is what a rank has of weights, gradients and optimizer state when the gradients are there and before the update, against
the closed form for N parameters on W ranks (:func:`expected_bytes`). Each engine is measured from what was there before it
was built; then all of them step in turns. Goal: held within 2 % of the closed form (small models have more beside: buffers, text).
"""

import argparse
import gc
import statistics
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import ledger
import torch
import torch.distributed as dist
from benchmark_step import DEPENDS_ON, make_batch, make_engine
from torch import Tensor
from tqdm import tqdm

from rmoe_megatron.config.loading import load_config
from rmoe_megatron.config.run import DeepSpeedConfig, EngineName, Precision, RunConfig
from rmoe_megatron.config.validation import validate
from rmoe_megatron.distributed.device import select_device, synchronize
from rmoe_megatron.distributed.launch import rank, world_size
from rmoe_megatron.distributed.process_groups import process_groups
from rmoe_megatron.engine.deepspeed.library import zero_section
from rmoe_megatron.engine.protocol import Engine
from rmoe_megatron.engine.registry import engine_of
from rmoe_megatron.errors import UserError
from rmoe_megatron.model.build import build_chunks
from rmoe_megatron.model.parameters import dense_parameters, expert_parameters
from rmoe_megatron.model.precision.backend import resolve_precision

MEGATRON = "Megatron-Core"
GRADIENT_BYTES = 4
ENGINES = {
    "megatron": (MEGATRON,),
    "deepspeed": ("ZeRO 1", "ZeRO 2", "ZeRO 3"),
    "both": (MEGATRON, "ZeRO 1", "ZeRO 2", "ZeRO 3"),
}


def expected_bytes(name: str, config: RunConfig, parameters: int, ranks: int) -> float:
    """Return the bytes that a rank holds of so many parameters, all of them trained and none of them spread modules.

    - Weights, at stage 3 a part of them.
    - Sums of gradients in float32. Megatron-Core has them whole; ZeRO's part is reduced by then, but for stage 1 in bf16, where
      DeepSpeed has the sums whole and the last gradients in bf16 beside them.
    - Of the part that a rank updates, float32 main weights and two moments. In float32 Megatron-Core's main weights are the
      weights themselves; DeepSpeed has a copy.
    - At stage 3 a bucket for gradients that are to be reduced, which DeepSpeed keeps.
    """
    weight, is_fp32 = config.precision.parameter_bytes, config.precision is Precision.fp32
    state = ((0 if name == MEGATRON and is_fp32 else 4) + 8) / ranks
    if name == MEGATRON:
        return parameters * (weight + GRADIENT_BYTES + state)
    if name == "ZeRO 1" and not is_fp32:
        return parameters * (weight + GRADIENT_BYTES + weight + state)
    if name == "ZeRO 3":
        bucket = zero_section(of_engine(config, name))["reduce_bucket_size"]
        return parameters * (weight / ranks + GRADIENT_BYTES / ranks + state) + GRADIENT_BYTES * bucket
    return parameters * (weight + GRADIENT_BYTES / ranks + state)


def of_engine(config: RunConfig, name: str) -> RunConfig:
    """Return a run's configuration with the engine of this name."""
    if name == MEGATRON:
        return replace(config, engine=EngineName.megatron, deepspeed=DeepSpeedConfig())
    return replace(
        config,
        engine=EngineName.deepspeed,
        deepspeed=replace(config.deepspeed, zero_stage=int(name.split()[1])),
    )


def held_bytes(device: torch.device) -> int:
    """Return the bytes of all tensors there are on a device."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    storages: dict[int, int] = {}
    for each in gc.get_objects():
        if not isinstance(each, Tensor) or each.device != device:
            continue
        for tensor in (each, each.grad if each.is_leaf else None):
            if tensor is not None and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def build(config: RunConfig, device: torch.device) -> tuple[Engine, int]:
    """Return an engine that has made two steps, and the bytes it holds before an update."""
    before, held = held_bytes(device), list[int]()
    engine = make_engine(config, build_chunks(config).to(device), device)
    for number in range(2):
        batches = [make_batch(config, number, device)]
        inputs = (
            sum(each.nbytes for each in batches[0].conditions.tensors().values()) + batches[0].latents.nbytes
        )
        engine.step(batches, lambda inputs=inputs: held.append(held_bytes(device) - before - inputs))  # type: ignore[misc]
    return engine, held[-1]


def measure(config: RunConfig, names: tuple[str, ...], repeats: int) -> list[dict[str, float | str]]:
    """Return a row for each engine: bytes held, the closed form, seconds of a step (median)."""
    rows: list[dict[str, float | str]] = []
    with process_groups(config) as device:
        parameters = dense_parameters(config) + expert_parameters(config)
        engines = {}
        for name in names:
            engines[name], held = build(of_engine(config, name), device)
            expected = expected_bytes(name, config, parameters, dist.get_world_size())
            rows.append({"name": name, "held": held, "expected": expected})
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for number in tqdm(range(repeats), disable=dist.get_rank() > 0):
            for name, engine in engines.items():
                batches = [make_batch(config, 2 + number, device)]
                dist.barrier()
                synchronize(device)
                started = time.perf_counter()
                engine.step(batches)
                synchronize(device)
                seconds[name].append(time.perf_counter() - started)
        for row in rows:
            row["seconds"] = statistics.median(seconds[str(row["name"])])
    return rows


def main() -> None:
    """Measure and print a table on rank 0."""
    warnings.filterwarnings("ignore")  # the libraries', as under `rmoe train`
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", type=Path, default=Path("configs/shapes_small.yaml"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings over the file's")
    parser.add_argument("--engine", choices=ENGINES, default="both", help="whose steps")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each; the median is taken")
    ledger.add_arguments(parser)
    arguments = parser.parse_intermixed_args()
    if arguments.repeats < 1:
        parser.error("--repeats is at least 1")
    try:
        rows, config = run(arguments.config, arguments.overrides, arguments.engine, arguments.repeats)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if rank() == 0:
        show(rows, config)
        device = select_device(config.device)
        for number, row in enumerate(rows):
            name = f"{config.precision.value}-{number}-{str(row['name']).lower().replace(' ', '')}"
            ledger.write(
                arguments,
                figures_of(row, rows[0], config),
                (*DEPENDS_ON, "tools/benchmark_parallel.py"),
                device,
                name,
            )


def figures_of(
    row: dict[str, float | str], first: dict[str, float | str], config: RunConfig
) -> dict[str, ledger.Figure]:
    """Return what the ledger keeps of a row; ``first`` is the row whose step the others are compared with."""
    held, expected, seconds = (float(row[key]) for key in ("held", "expected", "seconds"))
    return {
        "engine": row["name"],
        "precision": config.precision.value,
        "held_mb": held / 1e6,
        "over_closed_form": held / expected,
        "step_ms": seconds * 1e3,
        "over_first": seconds / float(first["seconds"]),
    }


def run(
    path: Path, overrides: list[str], engine: str, repeats: int
) -> tuple[list[dict[str, float | str]], RunConfig]:
    """Check a configuration and measure; returns the rows and what was measured."""
    config = resolve_precision(load_config(path, overrides))
    training = replace(config.training, global_batch_size=config.training.micro_batch_size * world_size())
    config = replace(config, training=training)
    for name in ENGINES[engine]:
        validate(of_engine(config, name), world_size())
        engine_of(of_engine(config, name)).check(of_engine(config, name), world_size())
    return measure(config, ENGINES[engine], repeats), config


def show(rows: list[dict[str, float | str]], config: RunConfig) -> None:
    """Print the table."""
    micro_batch = config.training.micro_batch_size
    print(f"{world_size()} ranks, {config.precision.value}, micro-batches of {micro_batch}")
    print("| engine | held a rank | closed form | held / closed form | step | step / first |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        held, expected, seconds = (float(row[key]) for key in ("held", "expected", "seconds"))
        print(
            f"| {row['name']} | {held / 1e6:.1f} MB | {expected / 1e6:.1f} MB | {held / expected:.3f} "
            f"| {seconds * 1e3:.0f} ms | {seconds / float(rows[0]['seconds']):.2f} |"
        )


if __name__ == "__main__":
    main()
