"""Looped blocks and losses of several depths against diffusers' own blocks in float64, closed forms and shallower models."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rmoe_megatron.config.layout_checks import check_layout
from rmoe_megatron.config.model import DepthLoss, DiffusionConfig, LoopConfig
from rmoe_megatron.config.run import ParallelConfig, Precision, Recompute, RunConfig
from rmoe_megatron.conversion.weight_names import to_diffusers
from rmoe_megatron.counter_rng import sample_keys
from rmoe_megatron.diffusion.depth_loss import depth_loss
from rmoe_megatron.errors import UserError
from rmoe_megatron.model.checks import check_model
from rmoe_megatron.model.flops import forward_flops_per_sample, training_flops_per_sample
from rmoe_megatron.pretrained.architecture import transformer_arguments, transformer_class
from tests.distributed.test_parity import assert_same_run
from tests.support.configurations import MODEL, RECURRENCE, one_rank, randomise, tiny_config
from tests.support.ranks import MMDIT, RECURRENT, configuration, layout, run_on_ranks, train

DEEP = replace(MODEL, num_layers=5)
LOOP = LoopConfig(first=1, last=2, times=3)


def with_loop(
    depth: str = "last", loop: LoopConfig | None = LOOP, recurrent: bool = False, **changes
) -> RunConfig:  # type: ignore[no-untyped-def]
    diffusion = DiffusionConfig(depth_loss=DepthLoss[depth])
    recurrence = replace(RECURRENCE, layers=[0, 2], steps=3) if recurrent else None
    return tiny_config(recurrence, **{"model": DEEP, "loop": loop, "diffusion": diffusion, **changes})


def batch(number: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "hidden_states": torch.randn(number, 3, 8, 8, generator=generator),
        "timestep": torch.linspace(15.0, 870.0, number),
        "encoder_hidden_states": torch.randn(number, MODEL.text_length, 12, generator=generator),
        "pooled_projections": torch.randn(number, 10, generator=generator),
    }


def run(config: RunConfig, model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    keys = sample_keys(0, torch.arange(len(inputs["timestep"])))
    return model(
        inputs["hidden_states"],
        inputs["timestep"],
        keys,
        inputs["encoder_hidden_states"],
        inputs["pooled_projections"],
    )


def looped_in_float64(
    stock: SD3Transformer2DModel, recalls: list[Tensor], inputs: dict[str, Tensor], loop: LoopConfig
) -> list[Tensor]:
    """The outputs after each pass, of diffusers' blocks called one by one."""
    blocks, exact = stock.transformer_blocks, {name: value.double() for name, value in inputs.items()}
    conditioning = stock.time_text_embed(exact["timestep"], exact["pooled_projections"])
    text, vision = (
        stock.context_embedder(exact["encoder_hidden_states"]),
        stock.pos_embed(exact["hidden_states"]),
    )
    for block in blocks[: loop.first]:
        text, vision = block(vision, text, conditioning)
    start, outputs = (text, vision), []
    for _ in range(loop.times):
        if recalls:
            text, vision = (
                torch.cat((state, first), -1) @ weight.T
                for state, first, weight in zip((text, vision), start, recalls, strict=True)
            )
        for block in blocks[loop.first : loop.last + 1]:
            text, vision = block(vision, text, conditioning)
        last_text, last_vision = text, vision
        for block in blocks[loop.last + 1 :]:
            last_text, last_vision = block(last_vision, last_text, conditioning)
        tokens = stock.proj_out(stock.norm_out(last_vision, conditioning))
        patches = tokens.view(len(tokens), 4, 4, 2, 2, 3).permute(0, 5, 1, 3, 2, 4)
        outputs.append(patches.reshape(len(tokens), 3, 8, 8))
    return outputs


@pytest.mark.parametrize(
    "loop",
    [LOOP, replace(LOOP, recall=False), LoopConfig(first=0, last=3, times=2)],
    ids=["recall", "naive", "all"],
)
def test_every_output_and_its_gradients_equal_diffusers_blocks_in_float64(loop: LoopConfig) -> None:
    from rmoe_megatron.model.mmdit.transformer import MMDiT

    config, inputs = with_loop("every", loop), batch()
    with one_rank(config):
        model = MMDiT(config)
        randomise(model)
        outputs = run(config, model, inputs)
        directions = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(3))
        (outputs * directions).sum().backward()
        named = to_diffusers(dict(model.named_parameters()) | dict(model.named_buffers()), config.model)
        gradients = to_diffusers(
            {name: value.grad for name, value in model.named_parameters() if value.grad is not None},
            config.model,
        )
        alone = run(config, model.eval(), inputs)
    base = replace(config, loop=None)
    stock = transformer_class(base)(**transformer_arguments(base)).double()
    assert type(stock) is SD3Transformer2DModel
    stock.load_state_dict(
        {name: value for name, value in named.items() if not name.startswith("recall.")}, strict=False
    )
    recalls = (
        [named[f"recall.{stream}.weight"].detach().double().requires_grad_() for stream in range(2)]
        if loop.recall
        else []
    )
    expected = looped_in_float64(stock, recalls, inputs, loop)
    sum((output * each.double()).sum() for output, each in zip(expected, directions, strict=True)).backward()
    assert outputs.shape[0] == loop.times
    for ours, theirs in [*zip(outputs, expected, strict=True), (alone, expected[-1])]:
        assert (ours.double() - theirs).norm() < 2e-5 * theirs.norm()
    leaves = dict(stock.named_parameters()) | {
        f"recall.{number}.weight": leaf for number, leaf in enumerate(recalls)
    }
    largest = max(leaf.grad.norm() for leaf in leaves.values() if leaf.grad is not None)
    compared = 0
    for name, leaf in leaves.items():
        if leaf.grad is not None and leaf.grad.norm() > 1e-6 * largest:
            assert (gradients[name].double() - leaf.grad).norm() < 1e-4 * leaf.grad.norm(), name
            compared += 1
    assert compared > 80


def test_a_fresh_recall_begins_with_what_entered_the_loop() -> None:
    """The first pass of an untrained model is that of a model without a loop."""
    from rmoe_megatron.model.mmdit.transformer import MMDiT

    config, inputs = with_loop("every"), batch()
    with one_rank(config), torch.no_grad():
        model, base = MMDiT(config), MMDiT(replace(config, loop=None, diffusion=DiffusionConfig())).eval()
        recalls = {
            name: value.clone() for name, value in model.named_parameters() if name.startswith("recall.")
        }
        randomise(model)
        for name, value in recalls.items():
            model.get_parameter(name).copy_(value)
        base.load_state_dict(
            {name: value for name, value in model.state_dict().items() if name not in recalls}
        )
        outputs = run(config, model, inputs)
        torch.testing.assert_close(outputs[0], run(config, base, inputs), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-2)


def test_the_drawn_depth_of_each_sample_is_one_of_every() -> None:
    from rmoe_megatron.model.mmdit.transformer import MMDiT

    loop = replace(LOOP, times=4)
    config, inputs = with_loop("drawn", loop, recurrent=True), batch(24)
    with one_rank(config), torch.no_grad():
        model, every = MMDiT(config), MMDiT(with_loop("every", loop, recurrent=True))
        randomise(model)
        every.load_state_dict(model.state_dict())
        drawn, outputs = run(config, model, inputs), run(config, every, inputs)
    assert drawn.shape[0] == 2
    torch.testing.assert_close(drawn[1], outputs[3])
    depths = [
        [depth for depth in range(4) if torch.allclose(drawn[0, sample], outputs[depth, sample], atol=1e-6)]
        for sample in range(24)
    ]
    assert {depth for found in depths for depth in found} == {0, 1, 2}
    assert all(len(found) == 1 for found in depths)


def test_every_number_of_latent_steps_is_a_model_with_so_many() -> None:
    from rmoe_megatron.model.mmdit.transformer import MMDiT

    config, inputs = with_loop("every", None, recurrent=True), batch()
    assert config.recurrence is not None
    with one_rank(config), torch.no_grad():
        model = MMDiT(config)
        randomise(model)
        outputs = run(config, model, inputs)
        for steps in (1, 2, 3):
            shallower = replace(
                config, recurrence=replace(config.recurrence, steps=steps), diffusion=DiffusionConfig()
            )
            other = MMDiT(shallower)
            other.load_state_dict(model.state_dict())
            torch.testing.assert_close(outputs[steps - 1], run(shallower, other, inputs))
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)


def test_the_losses_of_several_depths_are_those_of_their_definitions() -> None:
    outputs = torch.tensor([1.0, 3.0, 4.0]).view(3, 1, 1, 1, 1).requires_grad_()

    def loss(output: Tensor) -> Tensor:
        return output.square().mean()

    every = depth_loss(DiffusionConfig(depth_loss=DepthLoss.every), outputs, loss)
    assert every.item() == 16 + (1 + 9) / 2
    assert depth_loss(DiffusionConfig(depth_loss=DepthLoss.every), outputs[:1], loss).item() == 1
    distilled = DiffusionConfig(depth_loss=DepthLoss.drawn, distillation=0.25)
    drawn = depth_loss(distilled, outputs[1:], loss)
    assert drawn.item() == 16 + 0.75 * 9 + 0.25 * (4 - 3) ** 2
    drawn.backward()
    # 2 x 4 of the deepest's own loss alone: the distance from it pulls the shallower one.
    assert outputs.grad is not None
    assert outputs.grad.flatten().tolist() == [0, 0.75 * 6 - 0.25 * 2 * (4 - 3), 8]


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("recall", [True, False])
def test_exported_transformer_equals_the_training_model_at_every_depth(recurrent: bool, recall: bool) -> None:
    from rmoe_megatron.model.mmdit.transformer import MMDiT

    config, inputs = with_loop(loop=replace(LOOP, recall=recall), recurrent=recurrent), batch()
    assert config.loop is not None
    with one_rank(config), torch.no_grad():
        model = MMDiT(config).eval()
        randomise(model)
        theirs = transformer_class(config)(**transformer_arguments(config)).eval()
        theirs.load_state_dict(to_diffusers(model.state_dict(), config.model))
        for times in (3, 1, 5):
            deeper = replace(config, loop=replace(config.loop, times=times))
            other = MMDiT(deeper).eval()
            other.load_state_dict(model.state_dict())
            if times != 3:
                theirs.set_depth(times)
            expected, actual = run(deeper, other, inputs), theirs(**inputs).sample
            assert (actual - expected).norm() < 1e-5 * expected.norm()


def test_depth_of_an_exported_recurrence_is_its_latent_steps() -> None:
    from rmoe_megatron.model.mmdit.transformer import MMDiT

    config, inputs = tiny_config(), batch()
    assert config.recurrence is not None
    with one_rank(config), torch.no_grad():
        model = MMDiT(config).eval()
        randomise(model)
        theirs = transformer_class(config)(**transformer_arguments(config)).eval()
        theirs.load_state_dict(to_diffusers(model.state_dict(), config.model))
        theirs.set_depth(4)
        deeper = replace(config, recurrence=replace(config.recurrence, steps=4))
        other = MMDiT(deeper).eval()
        other.load_state_dict(model.state_dict())
        expected = run(deeper, other, inputs)
        assert (theirs(**inputs).sample - expected).norm() < 1e-5 * expected.norm()
    dense = tiny_config(None)
    own = transformer_class(dense, own=True)(**transformer_arguments(dense))
    with pytest.raises(ValueError, match="no depth"):
        own.set_depth(2)


FLOP_CASES = {
    "loop": with_loop(),
    "naive": with_loop(loop=replace(LOOP, recall=False)),
    "every": with_loop("every"),
    "drawn": with_loop("drawn"),
}


@pytest.mark.parametrize("name", FLOP_CASES)
def test_flops_equal_the_counter(name: str) -> None:
    from rmoe_megatron.model.mmdit.transformer import MMDiT

    config = FLOP_CASES[name]
    with one_rank(config), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model = MMDiT(config)
        with FlopCounterMode(display=False) as training:
            run(config, model, batch())
        with FlopCounterMode(display=False) as inference:
            run(config, model.eval(), batch())
    assert forward_flops_per_sample(config) == pytest.approx(inference.get_total_flops() / 2, rel=1e-3)
    assert training_flops_per_sample(config) == pytest.approx(3 * training.get_total_flops() / 2, rel=1e-3)


def test_flops_of_every_number_of_latent_steps_are_those_of_the_blocks_that_run() -> None:
    """Blocks before the first recurrence and both embeddings run once; the rest runs for 1, 2 and 3 steps."""
    every = with_loop("every", None, recurrent=True, model=replace(DEEP, num_layers=3))
    assert every.recurrence is not None
    every = replace(every, recurrence=replace(every.recurrence, layers=[1]))
    of_steps = [
        forward_flops_per_sample(replace(every, recurrence=replace(every.recurrence, steps=steps)))
        for steps in (1, 2, 3)
    ]
    alone = forward_flops_per_sample(replace(every, recurrence=None))
    without_first = forward_flops_per_sample(
        replace(every, recurrence=None, model=replace(every.model, num_layers=2))
    )
    embeddings = 2 * (16 * 12 * 32 + (256 + 32) * 32 + (10 + 32) * 32 + 5 * 12 * 32 + 2 * 32**2)
    once = alone - without_first + embeddings
    assert training_flops_per_sample(every) == pytest.approx(3 * (sum(of_steps) - 2 * once), rel=1e-9)


@pytest.mark.parametrize("depth", ["last", "every", "drawn"])
def test_calls_of_gates_are_counted(depth: str) -> None:
    from rmoe_megatron.engine.router_metrics import calls_of_gates
    from rmoe_megatron.model.mmdit.transformer import MMDiT
    from rmoe_megatron.model.recurrence.gate import Gate

    for loop in (LOOP, None):
        if loop is None and depth == "drawn":
            continue
        config, calls = with_loop(depth, loop, recurrent=True), []
        assert config.recurrence is not None
        config = replace(config, recurrence=replace(config.recurrence, layers=[0, 2, 4]))
        with one_rank(config), torch.no_grad():
            model = MMDiT(config)
            for gate in [module for module in model.modules() if isinstance(module, Gate)]:
                gate.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            run(config, model, batch())
        assert len(calls) == calls_of_gates(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (with_loop(loop=LoopConfig(first=2, last=1)), "in this order"),
        (with_loop(loop=LoopConfig(first=2, last=4)), "last block"),
        (with_loop("every", None), "needs loop or recurrence"),
        (with_loop("drawn", None, recurrent=True), "for latent steps take every"),
        (with_loop("drawn", replace(LOOP, times=1)), "two times or more"),
        (with_loop(loop=replace(LOOP, times=0)), "loop.times"),
    ],
)
def test_what_is_no_loop_is_refused(config: RunConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_model(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(parallel=layout(pp=5)), "pipeline"),
        (dict(training=replace(with_loop().training, compile=True)), "compile"),
        (dict(precision=Precision.fp8_emulated), "fp8_emulated"),
        (
            dict(
                parallel=ParallelConfig(overlap_grad_reduce=True),
                training=replace(with_loop().training, recompute=Recompute.full),
            ),
            "several parts",
        ),
    ],
)
@pytest.mark.parametrize(
    "asked", [with_loop(), with_loop("every", None, recurrent=True)], ids=["loop", "latent"]
)
def test_what_no_test_proves_is_refused(asked: RunConfig, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_layout(replace(asked, **changes), 5)


LOOPED = configuration(
    MMDIT, recurrent=True, loop=LoopConfig(first=1, last=2, times=3), diffusion=DiffusionConfig(depth_loss=DepthLoss.every),
    recurrence=replace(RECURRENT, steps=2),
)  # fmt: skip
DRAWN = configuration(
    MMDIT, recurrent=False, loop=LoopConfig(first=1, last=1, times=3), diffusion=DiffusionConfig(depth_loss=DepthLoss.drawn)
)  # fmt: skip
LATENT = configuration(MMDIT, recurrent=True, diffusion=DiffusionConfig(depth_loss=DepthLoss.every))


def spread(config: RunConfig, parallel: ParallelConfig, recompute: Recompute = Recompute.none) -> RunConfig:
    return replace(config, parallel=parallel, training=replace(config.training, recompute=recompute))


def test_layouts_train_as_one_process(tmp_path: Path) -> None:
    cases = {"looped": LOOPED, "drawn": DRAWN, "latent": LATENT}
    expected = run_on_ranks(1, cases, tmp_path)
    recomputed = {
        "looped": spread(LOOPED, layout(), Recompute.full),
        "latent": spread(LATENT, layout(), Recompute.selective),
    }
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 5000}
    layouts = {
        "looped TP2": spread(LOOPED, layout(tp=2, ep=2)),
        "looped DP2": spread(LOOPED, layout(**overlap)),
        "drawn CP2": spread(DRAWN, layout(cp=2)),
        "drawn TP2": spread(DRAWN, layout(tp=2)),
        "latent EP2": spread(LATENT, layout(ep=2)),
        "latent CP2": spread(LATENT, layout(cp=2)),
    }
    for name, result in run_on_ranks(1, recomputed, tmp_path).items():
        assert_same_run(result, expected[name], what=name)
    for name, result in run_on_ranks(2, layouts, tmp_path, partial(train, resumes=True)).items():
        assert_same_run(result, expected[name.split()[0]], what=name)
