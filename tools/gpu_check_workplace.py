"""What the GPU checks share: where they run, the models they run, and why one of them may not."""

import gc
import importlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from benchmark_step import make_engine

from rmoe_megatron.config.model import Architecture, ModelConfig, RecurrenceConfig
from rmoe_megatron.config.presets import PRESETS
from rmoe_megatron.config.run import (
    Backend,
    DataConfig,
    Device,
    Fp8Config,
    Fp8Recipe,
    OptimizerConfig,
    Precision,
    RunConfig,
    TrainingConfig,
)
from rmoe_megatron.engine.protocol import Engine
from rmoe_megatron.model.build import build_chunks
from rmoe_megatron.model.precision.backend import INSTALL, is_installed

PIXELS_PER_LATENT = 8  # along a side of an image

# The compute capability from which Transformer Engine has each recipe.
CAPABILITIES = {
    Fp8Recipe.tensorwise: (8, 9),
    Fp8Recipe.delayed: (8, 9),
    Fp8Recipe.blockwise: (9, 0),
    Fp8Recipe.mxfp8: (10, 0),
}

Figures = dict[str, Any]  # what a check found, as JSON has it


class Skipped(Exception):  # noqa: N818  # nothing is wrong
    """A check cannot run here; the message says what is missing and how to get it."""


@dataclass
class Workplace:
    """Where the checks run, and what one leaves for the next: one trainer at a time, and the times of steps.

    Args:
        small: take models that a CPU runs in seconds in the place of SD3-medium.
        folder: takes what a check writes.
    """

    device: torch.device
    small: bool
    folder: Path
    measured: dict[str, Any] = field(default_factory=dict)
    _resident: tuple[str, Engine] | None = None

    def trainer(self, name: str, config: RunConfig) -> Engine:
        """Return the trainer of ``config``, built unless the last one asked for has the same name; that one goes."""
        if self._resident is not None and self._resident[0] == name:
            return self._resident[1]
        self.release()
        # Random weights on the CPU would take longer than all the steps.
        modules = build_chunks(config, initialise=False).to(self.device)
        randomise_in_place(modules)
        self._resident = name, make_engine(config, modules, self.device)
        return self._resident[1]

    def release(self) -> None:
        """Give the memory of the last trainer back."""
        self._resident = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@torch.no_grad()
def randomise_in_place(modules: torch.nn.Module, std: float = 0.02) -> None:
    """Draw every parameter anew where it lies, so that no zero lets a kernel off."""
    for parameter in modules.parameters():
        parameter.normal_(std=std)


def speed_model(small: bool) -> ModelConfig:
    """Return SD3-medium, or a tiny MM-DiT."""
    if not small:
        values = PRESETS["sd3_medium"]
        return ModelConfig(**values | {"architecture": Architecture[values["architecture"]]})
    return ModelConfig(
        sample_size=16, patch_size=2, in_channels=4, num_layers=1, hidden_size=64, num_attention_heads=2,
        qk_norm=False, text_length=8, text_hidden_size=32, pooled_size=32, pos_embed_max_size=8,
    )  # fmt: skip


def parity_model(small: bool) -> ModelConfig:
    """Return a model small enough for the CPU to take the same step; all that SD3.5-medium has is in it."""
    width = 64 if small else 256
    return ModelConfig(
        sample_size=8 if small else 32, patch_size=2, in_channels=16, num_layers=3, hidden_size=width,
        num_attention_heads=width // 32 if small else width // 64, qk_norm=True, text_length=16,
        text_hidden_size=width, pooled_size=width, pos_embed_max_size=16, dual_attention_layers=[0],
    )  # fmt: skip


def run_config(model: ModelConfig, precision: Precision, device: torch.device, batch: int) -> RunConfig:
    """Return a run of steps on random batches."""
    return RunConfig(
        run_dir="unused",
        precision=precision,
        device=Device(device.type),
        model=model,
        data=DataConfig(train="unused"),
        optimizer=OptimizerConfig(learning_rate=1e-5),
        training=TrainingConfig(steps=10_000, micro_batch_size=batch, global_batch_size=batch),
    )


def recurrence_of(num_modules: int, steps: int, small: bool) -> RecurrenceConfig:
    """Return a recurrence in the blocks and of the rank of the paper's, or one for a tiny model."""
    layers, rank = ([0], 8) if small else ([4, 8, 12], 128)
    return RecurrenceConfig(layers, num_modules=num_modules, steps=steps, rank=rank, up_init_std=0.02)


def with_size(config: RunConfig, side: int, batch: int) -> RunConfig:
    """Return the run on micro-batches of ``batch`` square latents of ``side``."""
    training = replace(config.training, micro_batch_size=batch, global_batch_size=batch)
    return replace(config, model=replace(config.model, sample_size=side), training=training)


def with_backend(config: RunConfig, backend: Backend) -> RunConfig:
    """Return the run with its linear layers from ``backend``."""
    return replace(config, backend=backend)


def with_fp8(config: RunConfig, recipe: Fp8Recipe, precision: Precision = Precision.fp8) -> RunConfig:
    """Return the run in FP8, or in its emulation, with one of the recipes; as many blocks in FP8 as it allows."""
    kept = 0 if recipe is Fp8Recipe.delayed or config.model.num_layers < 3 else 1
    return replace(config, precision=precision, fp8=Fp8Config(recipe, kept, kept))


def require_cuda(workplace: Workplace, reason: str) -> None:
    """Raise Skipped with ``reason`` where there is no GPU."""
    if workplace.device.type != "cuda":
        raise Skipped(f"needs a GPU: {reason}")


def require_transformer_engine(workplace: Workplace) -> None:
    """Raise Skipped where Transformer Engine is not installed, does not load, or has no GPU."""
    if not is_installed("transformer_engine"):
        raise Skipped(f"Transformer Engine is not installed: {INSTALL}")
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError) as error:
        raise Skipped(f"Transformer Engine does not load ({error}): {INSTALL}") from error
    require_cuda(workplace, "Transformer Engine has no layers for the CPU")


def require_recipe(workplace: Workplace, recipe: Fp8Recipe) -> None:
    """Raise Skipped where this GPU has no FP8, or not that of ``recipe``."""
    least, mine = CAPABILITIES[recipe], torch.cuda.get_device_capability(workplace.device)
    if mine < least:
        raise Skipped(
            f"needs a GPU of compute capability {least[0]}.{least[1]} or more; this one has {mine[0]}.{mine[1]}"
        )


def require_compiler(workplace: Workplace) -> None:
    """Raise Skipped where torch.compile has nothing to compile with."""
    if workplace.device.type == "cuda":
        if not is_installed("triton"):
            raise Skipped("Triton is not installed: pip install triton")
    elif shutil.which("g++") is None:
        raise Skipped("there is no C++ compiler for torch.compile: apt-get install g++")


def fitting[T](batch: int, action: Callable[[int], T]) -> T:
    """Return what ``action`` makes of ``batch``, of half of it if the memory runs out, and so on."""
    while True:
        try:
            return action(batch)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        # Outside the handler, whose traceback holds the tensors of the attempt.
        batch //= 2
        gc.collect()
        torch.cuda.empty_cache()
