"""Runs in emulated FP8 and NVFP4: which layers are rounded, that they train, and that checkpoints stay the same."""

from dataclasses import replace

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
from rmoe_megatron.model.emulated_linear import (
    EmulatedColumnParallelLinear,
    EmulatedExperts,
    EmulatedRowParallelLinear,
    rounded_output,
)
from rmoe_megatron.model.quantization import RECIPES
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


def test_gradients_of_a_rounded_model_point_where_those_of_bf16_do() -> None:
    gradients = {}
    for precision in (Precision.bf16, Precision.fp8_emulated):
        fp8 = Fp8Config() if precision is Precision.bf16 else Fp8Config(Fp8Recipe.mxfp8, 0, 0)
        config = replace(emulated(precision), recurrence=None, fp8=fp8)
        with one_rank(config):
            model = build_transformer(config)
            randomise(model)
            batch = make_batch(0)
            output = model(
                latents=batch.latents, timestep=torch.full((4,), 500.0), sample_keys=batch.sample_index,
                text_hidden_states=batch.conditions.text_hidden_states, text_pooled=batch.conditions.text_pooled,
            )  # fmt: skip
            output.square().sum().backward()
            gradients[precision] = torch.cat(
                [each.grad.float().flatten() for each in model.parameters() if each.grad is not None]
            )
    exact, found = gradients[Precision.bf16], gradients[Precision.fp8_emulated]
    assert torch.nn.functional.cosine_similarity(exact, found, dim=0) > 0.99
    assert (exact - found).norm() > 1e-3 * exact.norm()
