"""Runs in emulated FP8 and NVFP4: which layers are rounded, that they train, and that checkpoints stay the same."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from rmoe_megatron.config.precision_checks import check_precision
from rmoe_megatron.config.run import (
    Backend,
    Fp8Config,
    Fp8Recipe,
    ParallelConfig,
    Precision,
    Recompute,
    RunConfig,
)
from rmoe_megatron.data.batch import Batch
from rmoe_megatron.diffusion.loss import DiffusionLoss
from rmoe_megatron.engine.registry import build_engine
from rmoe_megatron.errors import UserError
from rmoe_megatron.model.build import build_chunks, build_transformer
from rmoe_megatron.model.precision.emulated_linear import (
    EmulatedColumnParallelLinear,
    EmulatedExperts,
    EmulatedRowParallelLinear,
    rounded_output,
)
from rmoe_megatron.model.precision.rounding import RECIPES
from rmoe_megatron.model.transformer_config import transformer_config
from tests.model.test_compile import make_batch
from tests.support.configurations import HIDDEN, MODEL, RECURRENCE, one_rank, randomise, tiny_config

RECOMPUTED = replace(tiny_config().training, recompute=Recompute.full)


def emulated(
    precision: Precision, recipe: Fp8Recipe = Fp8Recipe.tensorwise, first: int = 1, last: int = 1
) -> RunConfig:
    model = replace(MODEL, num_layers=4)
    return replace(
        tiny_config(RECURRENCE, model=model), precision=precision, fp8=Fp8Config(recipe, first, last)
    )


def test_linear_layers_of_the_middle_blocks_are_rounded() -> None:
    """Modulations, gate, modules, embeddings and the output keep their type, and so do the first and last blocks."""
    with one_rank(emulated(Precision.fp8_emulated)) as _:
        model = build_transformer(emulated(Precision.fp8_emulated))
    layers = (EmulatedColumnParallelLinear, EmulatedRowParallelLinear)
    rounded = {name for name, module in model.named_modules() if isinstance(module, layers)}
    names = [
        f"{part}.{layer}" for part, layer in (
            ("attention", "linear_qkv"), ("attention", "linear_qkv_context"), ("attention", "linear_proj"),
            ("attention", "linear_proj_context"), ("mlp", "linear_fc1"), ("mlp", "linear_fc2"),
            ("mlp_context", "linear_fc1"), ("mlp_context", "linear_fc2"),
        )
    ]  # fmt: skip
    assert rounded == {f"transformer.layers.{block}.{name}" for block in (1, 2) for name in names}


@pytest.mark.parametrize("rank", [4, None])
def test_modules_are_rounded_each_by_itself(rank: int | None) -> None:
    """A module's output is that of a rounded linear layer of its own tokens, wherever the other tokens go."""
    recipe, counts = RECIPES[Fp8Recipe.tensorwise], torch.tensor([3, 0, 8, 5])
    recurrence = replace(RECURRENCE, rank=rank)
    config = replace(emulated(Precision.fp8_emulated), precision=Precision.fp32, fp8=Fp8Config())
    with one_rank(config):
        groups = ProcessGroupCollection.use_mpu_process_groups()
        experts = EmulatedExperts(transformer_config(config), recurrence, groups, recipe=recipe)
        randomise(experts)
    tokens = torch.randn(16, HIDDEN, generator=torch.Generator().manual_seed(0)) * torch.logspace(
        -2, 2, 16
    ).unsqueeze(1)
    found = experts(tokens, counts, torch.ones(16)).split(counts.tolist())
    for module, (mine, projected) in enumerate(zip(tokens.split(counts.tolist()), found, strict=True)):
        if rank is None:
            expected = rounded_output(recipe, mine, experts.weight[module])
        else:
            reduced = rounded_output(recipe, mine, experts.down[module]).chunk(3, dim=-1)
            expected = torch.cat(
                [
                    rounded_output(recipe, part, up)
                    for part, up in zip(reduced, experts.up[module], strict=True)
                ],
                -1,
            )
        torch.testing.assert_close(
            projected, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item() if len(mine) else 0
        )


def test_a_recurrence_in_low_precision_has_rounded_modules() -> None:
    for recipe, rounded in ((Fp8Recipe.mxfp8, {1, 2}), (Fp8Recipe.delayed, set())):
        config = emulated(Precision.fp8_emulated, recipe)
        with one_rank(config):
            model = build_transformer(config)
        blocks = {layer: block for layer, block in enumerate(model.transformer.layers)}
        assert {
            layer
            for layer, block in blocks.items()
            if layer in RECURRENCE.layers and isinstance(block.recurrence.experts, EmulatedExperts)
        } == rounded


def test_weights_have_the_names_shapes_and_types_of_bf16() -> None:
    found = {}
    for precision in (Precision.bf16, Precision.fp8_emulated, Precision.nvfp4_emulated):
        config = (
            emulated(precision, first=0, last=0)
            if precision.is_emulated
            else replace(emulated(precision), fp8=Fp8Config())
        )
        with one_rank(config):
            found[precision] = {
                name: (value.shape, value.dtype, value.double().sum().item())
                for name, value in build_transformer(config).named_parameters()
            }
    assert found[Precision.bf16] == found[Precision.fp8_emulated] == found[Precision.nvfp4_emulated]


def faint_batch(draw: int) -> Batch:
    """Pictures that are nearly nothing, whose noise can be learned to be seen."""
    batch = make_batch(draw)
    return replace(batch, latents=batch.latents / 8)


def losses(config: RunConfig, steps: int = 40) -> list[float]:
    """Losses of training, and of a batch that was not trained on at the end."""
    config = replace(config, optimizer=replace(config.optimizer, learning_rate=3e-3, warmup_steps=5))
    with one_rank(config):
        modules = build_chunks(config)
        null = make_batch(0).conditions.map(lambda tensor: tensor[:1])
        engine = build_engine(config, modules, DiffusionLoss(config, config.seed, null))
        found = [
            engine.step([faint_batch(2 * step), faint_batch(2 * step + 1)]).loss for step in range(steps)
        ]
        return [*found, engine.evaluate([faint_batch(1000 + number) for number in range(4)])]


def test_training_is_close_to_that_in_bf16() -> None:
    """Within 2 % of bf16's validation loss, and not the same."""
    expected = losses(replace(emulated(Precision.bf16), fp8=Fp8Config()))
    assert expected[-1] < 0.7 * expected[0]
    for recipe in Fp8Recipe:
        found = losses(emulated(Precision.fp8_emulated, recipe, first=0, last=0))
        assert found[-1] == pytest.approx(expected[-1], rel=0.02), recipe
        assert found[1:] != expected[1:]
    found = losses(emulated(Precision.nvfp4_emulated, first=0, last=0))
    assert found[-1] == pytest.approx(expected[-1], rel=0.05)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fp8": Fp8Config(num_layers_at_start_in_bf16=2, num_layers_at_end_in_bf16=2)}, "4 blocks"),
        ({"parallel": ParallelConfig(2, True)}, "tensor_model_parallel_size=2"),
        ({"parallel": ParallelConfig(context_parallel_size=2)}, "context_parallel_size=2"),
        ({"fp8": Fp8Config(Fp8Recipe.delayed), "training": RECOMPUTED}, "training.recompute=full"),
        ({"backend": Backend.transformer_engine}, "layers of its own"),
        ({"precision": Precision.bf16, "fp8": Fp8Config(Fp8Recipe.mxfp8)}, "precision is bf16"),
        ({"precision": Precision.fp8, "backend": Backend.local}, "backend is local"),
        ({"precision": Precision.fp8, "fp8": Fp8Config(Fp8Recipe.delayed)}, "one history"),
        (
            {"precision": Precision.fp8},
            r"micro_batch_size x model.text_length \(20\) is not divisible by 16",
        ),
        ({"precision": Precision.fp8, "training": RECOMPUTED}, "training.recompute is not for precision=fp8"),
        ({"precision": Precision.nvfp4_emulated, "fp8": Fp8Config(Fp8Recipe.mxfp8)}, "recipe of its own"),
    ],
)
def test_what_is_not_there_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_precision(replace(emulated(Precision.fp8_emulated), **changes))


def mxfp8(values: torch.Tensor, along: int) -> torch.Tensor:
    """Blocks of 32 along a dimension share the least power of two that brings them below 448; then E4M3."""
    blocks = values.double().movedim(along, -1).unflatten(-1, (-1, 32))
    exponent = (blocks.abs().amax(-1, keepdim=True) / 448).log2().ceil()
    rounded = (blocks * 2**-exponent).float().to(torch.float8_e4m3fn).double() * 2**exponent
    return torch.where(blocks == 0, 0.0, rounded).flatten(-2).movedim(-1, along).float()


class ByHand(torch.autograd.Function):
    """A linear layer whose three products have rounded operands, as the documentation of the recipe says."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tokens, weight)
        return (mxfp8(tokens, -1) @ mxfp8(weight, -1).T).to(tokens.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (tokens, weight), gradient = ctx.saved_tensors, gradients[0]
        of_tokens = mxfp8(gradient, -1) @ mxfp8(weight, -2)
        return of_tokens.to(tokens.dtype), (mxfp8(gradient, -2).T @ mxfp8(tokens, -2)).to(weight.dtype)


def test_a_rounded_model_is_the_bf16_model_with_products_that_are_rounded_by_hand() -> None:
    """Outputs and gradients of all weights; tokens (32 of vision, 32 of text), features and widths are whole blocks."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    model_config = replace(MODEL, num_layers=2, text_length=8)
    for kind in ("rounded", "by hand", "bf16"):
        fp8 = Fp8Config(Fp8Recipe.mxfp8, 0, 0) if kind == "rounded" else Fp8Config()
        precision = Precision.fp8_emulated if kind == "rounded" else Precision.bf16
        config = replace(tiny_config(None, model=model_config), precision=precision, fp8=fp8)
        with one_rank(config):
            model = build_transformer(config)
            randomise(model)
            if kind == "by hand":
                for name, module in model.named_modules():
                    if name.startswith("transformer.layers") and name.endswith(ROUNDED):
                        module.forward = partial(forward_by_hand, module)
            latents, text = (
                torch.randn(size, generator=torch.Generator().manual_seed(1))
                for size in ((4, 3, 8, 8), (4, 8, 12))
            )
            output = model(
                latents=latents, timestep=torch.full((4,), 500.0), rng_keys=torch.arange(4), text_hidden_states=text,
                text_pooled=text[:, 0, :10],
            )  # fmt: skip
            output.square().sum().backward()
            found[kind] = {"output": output.detach()} | {
                name: each.grad.float() for name, each in model.named_parameters() if each.grad is not None
            }
    assert found["rounded"].keys() == found["by hand"].keys()
    for name, expected in found["by hand"].items():
        # What bf16 makes of sums in another order, far below what rounding to eight bits makes.
        assert (found["rounded"][name] - expected).norm() <= 5e-3 * expected.norm(), name
    away = torch.stack(
        [
            (found["bf16"][name] - each).norm() / each.norm()
            for name, each in found["by hand"].items()
            if each.any()
        ]
    )
    assert away.median() > 2e-2


ROUNDED = (
    "linear_qkv",
    "linear_qkv_context",
    "linear_proj",
    "linear_proj_context",
    "linear_fc1",
    "linear_fc2",
)


def forward_by_hand(
    module: torch.nn.Module, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    output = ByHand.apply(tokens.flatten(0, -2), module.weight).unflatten(0, tokens.shape[:-1])
    if module.skip_bias_add:
        return output, module.bias
    return output + module.bias, None
