"""Times a training step against diffusers and against the FLOP count; prints ratios.

    python tools/benchmark_step.py [CONFIG] [--batch 32] [--repeats 10] [--muon]

Three questions, answered in one process with interleaved measurements, medians over repeats:
1. Is a step of the dense model (forward, backward, AdamW) as fast as the same step of diffusers'
   SD3Transformer2DModel of the same size with PyTorch's AdamW, in the same precision?
2. Does recurrence (M=5, T=2) cost what its FLOPs say?
3. With ``--muon``: what does Muon add to a step of the dense model with AdamW?

Beside them the rate of one matrix product alone: a ratio that holds where another library's speed changes. The goals are those of ``tools/benchmark_goals.py`` for this processor.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ledger
import torch
from benchmark_goals import dense_goal, judged, recurrence_goal
from diffusers import SD3Transformer2DModel
from tqdm import tqdm

from rmoe_megatron.config.loading import load_config
from rmoe_megatron.config.model import Prediction, RecurrenceConfig
from rmoe_megatron.config.run import OptimizerName, RunConfig
from rmoe_megatron.counter_rng import sample_keys
from rmoe_megatron.data.batch import Batch, TextConditions
from rmoe_megatron.diffusion.build import build_objective
from rmoe_megatron.diffusion.loss import DiffusionLoss
from rmoe_megatron.distributed.device import PARAMS_DTYPE, compiled, synchronize
from rmoe_megatron.distributed.process_groups import process_groups
from rmoe_megatron.distributed.processor import bf16_is_fast, describe_processor
from rmoe_megatron.engine.protocol import Engine
from rmoe_megatron.engine.registry import build_engine
from rmoe_megatron.model.build import build_chunks
from rmoe_megatron.model.flops import training_flops_per_sample
from rmoe_megatron.model.precision.backend import resolve_precision
from rmoe_megatron.pretrained.architecture import transformer_arguments

Step = Callable[[int], None]

# Code that the figures of a training step depend on.
DEPENDS_ON = (
    "rmoe_megatron/diffusion",
    "rmoe_megatron/engine",
    "rmoe_megatron/model",
    "rmoe_megatron/distributed/device.py",
    "rmoe_megatron/distributed/megatron_on_cpu.py",
    "tools/benchmark_step.py",
)


def make_batch(config: RunConfig, index: int, device: torch.device) -> Batch:
    """Return random latents and text; routing differs from step to step, as in training."""
    model, batch = config.model, config.training.micro_batch_size
    size = (batch, model.in_channels, model.sample_size, model.sample_size)
    text = TextConditions(
        torch.randn(batch, model.text_length, model.text_hidden_size, device=device),
        torch.randn(batch, model.pooled_size, device=device),
    )
    return Batch(torch.randn(size, device=device), text, torch.arange(batch, device=device) + batch * index)


def make_engine(config: RunConfig, modules: torch.nn.ModuleList, device: torch.device) -> Engine:
    """Return this project's trainer of ``modules``, which are on ``device``."""
    null_conditions = make_batch(config, 0, device).conditions.map(lambda tensor: tensor[:1])
    return build_engine(config, modules, DiffusionLoss(config, config.seed, null_conditions))


def engine_step(engine: Engine, config: RunConfig, device: torch.device) -> Step:
    """Return a step of a trainer on batches of ``config``, whose size may be another than the one it was built with."""
    return lambda index: (engine.step([make_batch(config, index, device)]), None)[1]


def megatron_step(config: RunConfig, device: torch.device) -> Step:
    """Return a step of this project's trainer."""
    return engine_step(make_engine(config, build_chunks(config).to(device), device), config, device)


def diffusers_step(config: RunConfig, device: torch.device, compile: bool = False) -> Step:
    """Return the same step with diffusers' model under autocast-free ``dtype`` weights and PyTorch's AdamW.

    Args:
        compile: the model is compiled by ``torch.compile``.
    """
    dtype = PARAMS_DTYPE[config.precision]
    with device:  # weights are drawn where they stay: a GPU is many times faster at it
        model = SD3Transformer2DModel(**transformer_arguments(config)).to(dtype)
    forward = compiled(model.forward, fullgraph=False) if compile else model
    objective = build_objective(config, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.learning_rate)

    def step(index: int) -> None:
        batch = make_batch(config, index, device)
        text = batch.conditions.tensors()
        example = objective.add_noise(batch.latents, sample_keys(0, batch.draw_index))
        prediction = forward(
            hidden_states=example.noisy_latents.to(dtype),
            encoder_hidden_states=text["text_hidden_states"].to(dtype),
            pooled_projections=text["text_pooled"].to(dtype),
            timestep=example.timestep,
            return_dict=False,
        )[0]
        torch.nn.functional.mse_loss(prediction.float(), example.target).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(steps: dict[str, Step], repeats: int, device: torch.device) -> dict[str, float]:
    """Return the median seconds of each step; steps take turns, so that a slow minute slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    warm_up = 3
    for index in tqdm(range(warm_up + repeats), desc="benchmark", unit="round"):
        for name, step in steps.items():
            start = time.perf_counter()
            step(index)
            synchronize(device)
            if index >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def product_rate(config: RunConfig, device: torch.device, repeats: int) -> float:
    """Return FLOP/s of the product of all vision tokens with the weight of the MLP's first layer."""
    model, dtype = config.model, PARAMS_DTYPE[config.precision]
    rows = config.training.micro_batch_size * (model.sample_size // model.patch_size) ** 2
    tokens = torch.randn(rows, model.hidden_size, dtype=dtype, device=device)
    weight = torch.randn(4 * model.hidden_size, model.hidden_size, dtype=dtype, device=device)
    seconds = []
    for _ in range(3 + repeats):
        started = time.perf_counter()
        torch.nn.functional.linear(tokens, weight)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * rows * weight.numel() / statistics.median(seconds[3:])


def figures_of(
    medians: dict[str, float], dense: RunConfig, recurrent: RunConfig, rate: float
) -> dict[str, float]:
    """Return the figures of a measurement in milliseconds, and their ratios.

    Args:
        rate: FLOP/s of the MLP's product alone.
    """
    flops, batch = training_flops_per_sample(dense), dense.training.micro_batch_size
    flop_ratio = training_flops_per_sample(recurrent) / flops
    return {
        "batch": batch,
        **{f"{step}_ms": seconds * 1e3 for step, seconds in medians.items()},
        "dense_over_diffusers": medians["dense"] / medians["diffusers"],
        "flop_ratio": flop_ratio,
        **({"muon_over_adamw": medians["muon"] / medians["dense"]} if "muon" in medians else {}),
        "over_flops": medians["recurrent"] / medians["dense"] / flop_ratio,
        "dense_over_products": medians["dense"] * rate / (flops * batch),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", type=Path, default=Path("configs/shapes_tiny.yaml"))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--muon", action="store_true", help="measure the dense model with Muon, too")
    ledger.add_arguments(parser)
    parser.add_argument("overrides", nargs="*", help="key=value settings")
    arguments = parser.parse_intermixed_args()
    config = resolve_precision(load_config(arguments.config, arguments.overrides))
    training = replace(
        config.training, micro_batch_size=arguments.batch, global_batch_size=arguments.batch, steps=10_000
    )
    layers = config.recurrence.layers if config.recurrence else [config.model.num_layers // 2]
    recurrence = replace(config.recurrence or RecurrenceConfig(layers), num_modules=5, steps=2)
    velocity = replace(config.diffusion, prediction=Prediction.velocity)  # diffusers' model has no other
    dense = replace(config, training=training, recurrence=None, diffusion=velocity)
    recurrent = replace(dense, recurrence=recurrence)
    muon = replace(dense.optimizer, name=OptimizerName.muon, distributed_optimizer=False)
    with process_groups(config) as device:
        rate = product_rate(dense, device, arguments.repeats)
        steps = {
            "diffusers": diffusers_step(dense, device),
            "dense": megatron_step(dense, device),
            "recurrent": megatron_step(recurrent, device),
        }
        if arguments.muon:
            steps["muon"] = megatron_step(replace(dense, optimizer=muon), device)
        medians = measure(steps, arguments.repeats, device)
        rate = max(rate, product_rate(dense, device, arguments.repeats))
    found = figures_of(medians, dense, recurrent, rate)
    report(found, config, device)
    ledger.write(arguments, found, (*DEPENDS_ON, *_in_repository(arguments.config)), device)


def report(found: dict[str, float], config: RunConfig, device: torch.device) -> None:
    """Print the figures, with the goals of this processor."""
    print(
        f"{describe_processor(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, {config.precision.value}"
    )
    for step in ("diffusers", "dense", "recurrent", *(["muon"] if "muon_ms" in found else [])):
        milliseconds = found[f"{step}_ms"]
        print(f"  {step:10} {milliseconds:8.1f} ms  {found['batch'] / milliseconds * 1e3:7.1f} samples/s")
    width, is_cpu = config.model.hidden_size, device.type == "cpu"
    goal = dense_goal(width, config.precision, bf16_is_fast()) if is_cpu else None
    print(f"dense / diffusers: {judged(float(found['dense_over_diffusers']), goal)}")
    over_flops = judged(found["over_flops"], recurrence_goal(width) if is_cpu else None)
    print(
        f"recurrent / dense: {found['flop_ratio']:.3f} in FLOPs; over what FLOPs predict in time: {over_flops}"
    )
    if "muon_over_adamw" in found:
        print(f"dense with Muon / dense with AdamW: {found['muon_over_adamw']:.3f}")
    print(f"dense / its FLOPs at the rate of the MLP's product alone: {found['dense_over_products']:.3f}")


def _in_repository(config: Path) -> list[str]:
    path = config.resolve()
    return [str(path.relative_to(ledger.ROOT))] if path.is_relative_to(ledger.ROOT) else []


if __name__ == "__main__":
    main()
