"""Which layers of a trained model lose most in eight and four bits: ``rmoe diagnose precision``.

The model runs forward and backward in float32 on samples of the run. At every linear layer of its blocks, and in the experts of
a recurrence, the three products of training (output, gradient of the input, gradient of the weight) are taken again with
operands rounded by each recipe, and compared with the exact ones: the error is that of one layer alone, not what has piled up
before it.

Delayed scaling takes its scales from the calls before, so it comes with histories of the :data:`HISTORY` micro-batches before
those that are measured. In a run they are of the last 1024 calls; fewer know less of the largest values there are, and more of
what is measured saturates (of a toy's input gradients 7.3 % was lost after 8 micro-batches, 5.4 % after 32 and after 128). The
experts have no figures for delayed scaling, which leaves them as they are.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from matplotlib.figure import Figure
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import nn

from rmoe_megatron.checkpoint.folders import read_state
from rmoe_megatron.checkpoint.model_state import load_weights
from rmoe_megatron.checkpoint.weights import RunWeights
from rmoe_megatron.config.loading import load_config
from rmoe_megatron.config.run import (
    Backend,
    DeepSpeedConfig,
    EngineName,
    Fp8Config,
    ParallelConfig,
    Precision,
    Recompute,
    RunConfig,
    StageConfig,
)
from rmoe_megatron.config.stages import Stage, stage_at, stages_of
from rmoe_megatron.data.batch import Batch
from rmoe_megatron.diffusion.loss import DiffusionLoss
from rmoe_megatron.distributed.launch import require_one_rank
from rmoe_megatron.distributed.process_groups import process_groups
from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic
from rmoe_megatron.input_pipeline.batches import TrainingSource
from rmoe_megatron.inspection.watched_products import ALL_RECIPES, watch_products
from rmoe_megatron.model.build import build_chunks
from rmoe_megatron.training import preflight
from rmoe_megatron.training.logging import json_text

PRODUCTS = ("output", "input_gradient", "weight_gradient")
HISTORY = 32


@dataclass(frozen=True)
class Loss:
    """What a layer loses under a recipe: ``|rounded - exact| / |exact|`` of each product, averaged over batches.

    Attributes:
        block: number of the block, from 0.
        layer: name of the linear layer in it, or of the factor of the recurrence's experts.
        weight_gradient: the error of the weight's gradient; a frozen layer has one too, as if it were trained.
    """

    block: int
    layer: str
    recipe: str
    output: float
    input_gradient: float
    weight_gradient: float


def diagnose_precision(
    run_dir: Path,
    output: Path,
    batches: int,
    overrides: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Loss]:
    """Measure every layer under every recipe; writes ``precision.json`` and ``precision.png`` into ``output``.

    Nothing is written into the run, unless ``output`` lies there.

    Args:
        run_dir: the folder of a trained run; its newest checkpoint's averaged weights are taken, and the training data of the checkpoint's stage.
        batches: micro-batches to average over, after those of the histories.
        overrides: settings over the run's own, for data that have moved or another device.
        progress: called with the micro-batches done and the number of all.

    Raises:
        UserError: there is no such run, its data is not there, a setting makes another model of it, ``output`` cannot be
            written, or this is one of several ranks.
    """
    require_one_rank("rmoe diagnose precision")
    weights = RunWeights(run_dir)
    atomic.check_writable(output, "--out")
    config = _read_config(weights, run_dir, overrides)
    # As in validation: the stage of the checkpoint's last step, not of the one to come.
    stage = stage_at(stages_of(config), weights.checkpoint.step - 1)
    config = _in_one_process(config, run_dir, stage)
    preflight.check_looking(config)
    with process_groups(config) as device:
        modules = build_chunks(config, initialise=False)
        load_weights(modules, weights, fresh=lambda name: False)
        source = TrainingSource(config, device)
        model = modules[0].to(device).train()
        loss = DiffusionLoss(config, config.seed, source.null_conditions)
        watched = watch_products(model)
        total = HISTORY + batches
        for number, batch in enumerate(islice(source.batches_to_look_at(), total)):
            for product in watched.values():
                product.measures = number >= HISTORY
            _run(model, loss, batch.to(device))
            progress(number + 1, total)
    losses = [
        Loss(block, layer, recipe, *errors)
        for (block, layer), product in sorted(watched.items())
        for recipe, errors in product.mean_errors().items()
    ]
    described = json_text([asdict(each) for each in losses], indent=1) + "\n"
    with atomic.filling(output):
        atomic.write(output / "precision.json", described)
        atomic.write(output / "precision.png", draw_losses(losses))
    return losses


def _read_config(weights: RunWeights, run_dir: Path, overrides: Sequence[str]) -> RunConfig:
    """Return the checkpoint's configuration with other settings, which leave the model what it is."""
    path = weights.checkpoint.path
    if read_state(path).get("imported"):
        raise UserError(
            f"{run_dir} holds imported weights and no data to run them on; diagnose a run that started from them "
            f"(fine_tuning.base={run_dir})."
        )
    config = load_config(path / "config.yaml", [*overrides])
    for section in ("model", "recurrence", "lora", "diffusion"):
        if getattr(config, section) != getattr(weights.config, section):
            raise UserError(
                f"The weights in {path} are of another model ({section} differs from what is asked for); diagnose them "
                f"without overriding {section}."
            )
    return config


def _in_one_process(config: RunConfig, run_dir: Path, stage: Stage) -> RunConfig:
    """Return a run's configuration as it is here: one stage in float32 on one rank, nothing computed twice or frozen."""
    training, buckets = config.training, config.data.buckets
    training = replace(
        training,
        micro_batch_size=stage.micro_batch_size,
        global_batch_size=stage.micro_batch_size,
        # The stage's resolution; model.sample_size stays, which position embeddings follow.
        stages=[StageConfig(training.steps, stage.sample_size)] if training.stages else [],
        recompute=Recompute.none,
        compile=False,
    )
    data = replace(
        config.data,
        train=None,
        mixture=list(stage.datasets),
        buckets=buckets and replace(buckets, batch=None),
        validation=None,
    )
    return replace(
        config,
        run_dir=str(run_dir),  # it may have moved
        data=data,
        training=training,
        parallel=ParallelConfig(),
        precision=Precision.fp32,
        fp8=Fp8Config(),
        backend=Backend.local,
        engine=EngineName.megatron,
        deepspeed=DeepSpeedConfig(),
        fine_tuning=None,
    )


def _run(model: nn.Module, loss: DiffusionLoss, batch: Batch) -> None:
    # As Megatron-Core's schedule does for a step of one micro-batch; the process may have run others.
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=batch.latents.device))
    noised = loss.add_noise(batch)
    noised.loss(model(**noised.model_inputs())).backward()
    model.zero_grad()


def draw_losses(losses: list[Loss]) -> bytes:
    """Draw blocks by layers, one panel for each recipe and product, all on one scale; returns a PNG."""
    layers = sorted({each.layer for each in losses})
    blocks = 1 + max(each.block for each in losses)
    width, height = 2 + 0.28 * blocks, 1 + 0.28 * len(layers)
    figure = Figure(figsize=(2 + len(PRODUCTS) * width, len(ALL_RECIPES) * height), layout="constrained")
    panels = figure.subplots(len(ALL_RECIPES), len(PRODUCTS), squeeze=False, sharex=True, sharey=True)
    largest = max(max(getattr(each, product) for product in PRODUCTS) for each in losses)
    for row, recipe in zip(panels, ALL_RECIPES, strict=True):
        for axes, product in zip(row, PRODUCTS, strict=True):
            values = torch.full((len(layers), blocks), torch.nan)
            for each in losses:
                if each.recipe == recipe:
                    values[layers.index(each.layer), each.block] = getattr(each, product)
            image = axes.imshow(values, vmin=0, vmax=largest, aspect="auto", cmap="viridis")
            axes.set_title(f"{recipe}: {product.replace('_', ' ')}", fontsize=9)
            axes.set_yticks(range(len(layers)), layers, fontsize=7)
            axes.set_xticks(range(blocks))
            axes.tick_params(axis="x", labelsize=7)
    figure.supxlabel("block")
    figure.colorbar(image, ax=panels, label="|rounded - exact| / |exact|")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def worst(losses: list[Loss], recipe: str, count: int) -> list[Loss]:
    """Return the layers that lose most under a recipe, by the worst of their three products."""

    def error(loss: Loss) -> float:
        return max(getattr(loss, product) for product in PRODUCTS)

    return sorted((each for each in losses if each.recipe == recipe), key=error, reverse=True)[:count]
