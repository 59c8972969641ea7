"""Does DeepSpeed's engine train on a device as Megatron-Core's does: a few steps of a recurrent model at every stage of ZeRO.

The steps are taken in a process of their own: DeepSpeed changes the process it is in, and leaves memory behind.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace

import torch
from benchmark_step import make_batch, make_engine
from gpu_check_parity import BATCH, CPU, TOLERANCES, parity_config, randomise
from gpu_check_workplace import Figures, Skipped, Workplace
from torch import Tensor

from rmoe_megatron.config.run import DeepSpeedConfig, EngineName, Precision, RunConfig
from rmoe_megatron.distributed.process_groups import process_groups
from rmoe_megatron.engine.deepspeed.library import INSTALL
from rmoe_megatron.model.build import build_chunks
from rmoe_megatron.model.precision.backend import is_installed

STEPS = 4
SETTINGS = {
    "zero1": DeepSpeedConfig(zero_stage=1),
    "zero2": DeepSpeedConfig(zero_stage=2),
    "zero3": DeepSpeedConfig(zero_stage=3),
    "zero2_host_optimizer": DeepSpeedConfig(zero_stage=2, offload_optimizer=True),
    "zero3_host": DeepSpeedConfig(zero_stage=3, offload_optimizer=True, offload_parameters=True),
}


def losses_and_norms(config: RunConfig, device: torch.device) -> Tensor:
    """Take steps of two micro-batches from weights and batches that depend on nothing but the seed; returns float64 [STEPS, 2]."""
    modules = build_chunks(config)
    randomise(modules)
    engine = make_engine(config, modules.to(device), device)
    found = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for step in range(STEPS):
            result = engine.step([make_batch(config, 2 * step + number, CPU) for number in range(2)])
            found.append((result.loss, result.grad_norm))
    return torch.tensor(found, dtype=torch.float64)


def measure(device: torch.device, small: bool) -> Figures:
    """Return how far losses and norms under each setting are from Megatron-Core's engine, all on the device in fp32."""
    config = parity_config(Precision.fp32, device, small)
    # Rates that move the weights, clipping that scales the gradients.
    optimizer = replace(config.optimizer, learning_rate=1e-3, warmup_steps=0, clip_grad=0.05, eps=1e-6)
    training = replace(config.training, global_batch_size=2 * BATCH)
    config = replace(config, optimizer=optimizer, training=training)
    with process_groups(config) as device:
        reference = losses_and_norms(config, device)
        figures: Figures = {"losses": reference[:, 0].tolist()}
        for name, settings in SETTINGS.items():
            found = losses_and_norms(replace(config, engine=EngineName.deepspeed, deepspeed=settings), device)
            figures[f"{name}_error"] = float(((found - reference) / reference).abs().max())
    return figures


def parity_deepspeed(workplace: Workplace) -> Figures:
    """Hold losses and norms of DeepSpeed's engine to those of Megatron-Core's.

    Raises:
        Skipped: DeepSpeed is not installed.
        ValueError: they differ.
    """
    if not is_installed("deepspeed"):
        raise Skipped(f"DeepSpeed is not installed: {INSTALL}")
    workplace.release()
    command = [sys.executable, __file__, workplace.device.type, *(["--small"] if workplace.small else [])]
    # Its modules are where this process has found them.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise RuntimeError(f"the steps ended with exit code {done.returncode}: {lines[-1]}")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    for name in SETTINGS:
        error = figures[f"{name}_error"]
        if not error <= TOLERANCES["fp32"]:  # also NaN
            raise ValueError(
                f"{name}: losses and norms of {STEPS} steps are {error:.2g} off Megatron-Core's engine, more than "
                f"{TOLERANCES['fp32']:.2g}"
            )
    return figures


def main() -> None:
    """Print what :func:`measure` finds as a line of JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    print(json.dumps(measure(torch.device(arguments.device), arguments.small)))


if __name__ == "__main__":
    main()
