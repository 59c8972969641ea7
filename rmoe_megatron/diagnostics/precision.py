"""Which linear layers of a trained model lose most in eight and four bits: ``rmoe diagnose precision``.

The model runs forward and backward in float32 on samples of the run. At every linear layer of its blocks the three products of
training (output, gradient of the input, gradient of the weight) are taken again with operands rounded by each recipe, and
compared with the exact ones: the error is that of one layer alone, not what has piled up before it.
"""

import io
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from rmoe_megatron import durable
from rmoe_megatron.checkpoint.model_state import load_weights
from rmoe_megatron.checkpoint.weights import RunWeights
from rmoe_megatron.config.run import (
    Backend,
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
from rmoe_megatron.model.block import Block
from rmoe_megatron.model.build import build_chunks
from rmoe_megatron.model.emulated_linear import (
    rounded_input_gradient,
    rounded_output,
    rounded_weight_gradient,
)
from rmoe_megatron.model.layers import LOCAL
from rmoe_megatron.model.quantization import NVFP4, RECIPES, Recipe
from rmoe_megatron.parallel import process_groups
from rmoe_megatron.training import preflight
from rmoe_megatron.training.logging import json_text
from rmoe_megatron.training.source import TrainingSource

PRODUCTS = ("output", "input_gradient", "weight_gradient")
ALL_RECIPES = {recipe.value: rounding for recipe, rounding in RECIPES.items()} | {"nvfp4": NVFP4}


@dataclass(frozen=True)
class Loss:
    """What a layer loses under a recipe: ``|rounded - exact| / |exact|`` of each product, averaged over batches.

    Attributes:
        block: number of the block, from 0.
        layer: name of the linear layer in it.
        weight_gradient: of a frozen layer too, as if it were trained.
    """

    block: int
    layer: str
    recipe: str
    output: float
    input_gradient: float
    weight_gradient: float


def diagnose_precision(
    run_dir: Path, output: Path, batches: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Loss]:
    """Measure every layer under every recipe; writes ``precision.json`` and ``precision.png`` into ``output``.

    Nothing is written into the run, unless ``output`` lies there.

    Args:
        run_dir: of a trained run; its newest checkpoint's averaged weights are taken, and the training data of the checkpoint's stage.
        batches: micro-batches to average over.
        progress: called with the batches done and their number.

    Raises:
        UserError: there is no such run, its data is not there, or ``output`` cannot be written.
    """
    weights = RunWeights(run_dir)
    durable.check_writable(output, "--out")
    # As in validation: the stage of the checkpoint's last step, not of the one to come.
    stage = stage_at(stages_of(weights.config), weights.checkpoint.step - 1)
    config = _in_one_process(weights.config, run_dir, stage)
    preflight.check_looking(config)
    with process_groups(config) as device:
        modules = build_chunks(config, initialise=False)
        load_weights(modules, weights, fresh=lambda name: False)
        source = TrainingSource(config, device)
        model = modules[0].to(device).train()
        loss = DiffusionLoss(config, config.seed, source.null_conditions)
        errors: dict[tuple[int, str, str], list[tuple[float, ...]]] = defaultdict(list)
        for block in (module for module in model.modules() if isinstance(module, Block)):
            for name, layer in linear_layers(block).items():
                layer.register_forward_hook(_Measurement(block.layer_number - 1, name, errors))
        for number, batch in enumerate(islice(source.batches_to_look_at(), batches), start=1):
            _run(model, loss, batch.to(device))
            progress(number, batches)
    losses = [
        Loss(*key, *(fmean(values) for values in zip(*found, strict=True)))
        for key, found in sorted(errors.items())
    ]
    output.mkdir(parents=True, exist_ok=True)
    durable.write(output / "precision.json", json_text([asdict(each) for each in losses], indent=1) + "\n")
    durable.write(output / "precision.png", draw_losses(losses))
    return losses


def linear_layers(block: Block) -> dict[str, nn.Module]:
    """Return the linear layers of a block that a low precision would round, by name."""
    kinds = (LOCAL.column_parallel_linear, LOCAL.row_parallel_linear)
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, kinds) and "modulation" not in name  # type: ignore[arg-type]
    }


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
        fine_tuning=None,
    )


def _run(model: nn.Module, loss: DiffusionLoss, batch: Batch) -> None:
    question = loss.ask(batch)
    question.loss(model(**question.arguments())).backward()
    model.zero_grad()


class _Measurement:
    """A forward hook that measures a layer once the gradient of its output is there."""

    def __init__(
        self, block: int, layer: str, errors: dict[tuple[int, str, str], list[tuple[float, ...]]]
    ) -> None:
        self.block, self.layer, self.errors = block, layer, errors

    def __call__(
        self, module: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor | None]
    ) -> None:
        tokens, weight = inputs[0].detach().flatten(0, -2), module.weight.detach()
        if outputs[0].requires_grad:
            outputs[0].register_hook(lambda gradient: self._measure(tokens, weight, gradient.flatten(0, -2)))

    def _measure(self, tokens: Tensor, weight: Tensor, gradient: Tensor) -> None:
        exact = (tokens @ weight.t(), gradient @ weight, gradient.t() @ tokens)
        for name, recipe in ALL_RECIPES.items():
            rounded = products(recipe, tokens, weight, gradient)
            found = tuple(
                ((ours - true).norm() / true.norm().clamp_min(torch.finfo(true.dtype).tiny)).item()
                for ours, true in zip(rounded, exact, strict=True)
            )
            self.errors[self.block, self.layer, name].append(found)


def products(
    recipe: Recipe, tokens: Tensor, weight: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, input gradient and weight gradient of a layer from rounded operands [N, K], [O, K] and [N, O]."""
    return (
        rounded_output(recipe, tokens, weight),
        rounded_input_gradient(recipe, gradient, weight),
        rounded_weight_gradient(recipe, gradient, tokens),
    )


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
