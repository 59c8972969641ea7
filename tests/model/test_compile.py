"""Blocks and whole models through torch.compile compute what they compute without it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rmoe_megatron.config.layout_checks import check_layout
from rmoe_megatron.config.model import LoraConfig
from rmoe_megatron.config.run import FineTuningConfig, ParallelConfig, Recompute, Trainable
from rmoe_megatron.data.batch import Batch, TextConditions
from rmoe_megatron.diffusion.loss import DiffusionLoss, model_arguments
from rmoe_megatron.engine.registry import build_engine
from rmoe_megatron.errors import UserError
from rmoe_megatron.model.build import build_chunks, build_transformer
from rmoe_megatron.training.fine_tuning import freeze
from tests.support.configurations import MODEL, RECURRENCE, TEXT_LENGTH, one_rank, randomise, tiny_config


def make_batch(draw: int, height: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(draw)
    latents, text, pooled = (
        torch.randn(4, *size, generator=generator) for size in ((3, height, 8), (TEXT_LENGTH, 12), (10,))
    )
    return Batch(latents, TextConditions(text, pooled), torch.arange(4) + 4 * draw)


def outputs_and_gradients(model: torch.nn.Module, call: Callable[..., Tensor]) -> tuple[Tensor, list[Tensor]]:
    batch = make_batch(0)
    timestep = torch.tensor([1.0, 10.0, 500.0, 900.0])
    output = call(**model_arguments(batch.latents, timestep, batch.draw_index, batch.conditions))
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((output * weights).sum(), [*model.parameters()], materialize_grads=True)
    return output, list(gradients)


def test_a_dense_model_is_one_graph() -> None:
    """The whole model, its embeddings and all its blocks, through inductor without a break."""
    config = tiny_config(None, model=replace(MODEL, num_layers=2))
    with one_rank(config):
        model = build_transformer(config)
        randomise(model)
        expected, expected_gradients = outputs_and_gradients(model, model)
        with torch.compiler.set_stance("default"):
            output, gradients = outputs_and_gradients(model, torch.compile(model, fullgraph=True))
    assert (output - expected).norm() < 1e-5 * expected.norm()
    assert sum(gradient.norm() for gradient in expected_gradients) > 0
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert (found - wanted).norm() < 1e-4 * wanted.norm().clamp_min(1e-2)


@pytest.fixture
def quick_compile(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Graphs are captured, forward and backward, but run by PyTorch's own kernels; yields ``fullgraph`` of each block."""
    asked: list[bool] = []
    original = torch.compile

    def compile(function: Callable[..., Tensor], fullgraph: bool) -> Callable[..., Tensor]:
        asked.append(fullgraph)
        return original(function, fullgraph=fullgraph, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile)
    torch.compiler.reset()
    yield asked
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({"recurrence": None}, []),
        ({"recurrence": RECURRENCE}, RECURRENCE.layers),
        (
            {"recurrence": None, "lora": LoraConfig([0, 2], rank=4), "fine_tuning": FineTuningConfig("base")},
            [0, 2],
        ),
        ({"recurrence": None, "fine_tuning": FineTuningConfig("base", Trainable.blocks, [1])}, []),
    ],
    ids=["dense", "recurrence", "frozen with LoRA", "one trained block"],
)
def test_a_compiled_run_trains_alike(quick_compile: list[bool], changes: dict, broken: list[int]) -> None:
    """Losses, norms and weights of steps over two sizes; blocks without an adapter are one graph each, others may break."""
    config = tiny_config(**changes)
    found = {}
    for compile in (False, True):
        run = replace(config, training=replace(config.training, compile=compile))
        with one_rank(run):
            modules = build_chunks(run)
            randomise(modules)
            if config.fine_tuning is not None:
                freeze(modules, config.fine_tuning)
            null = make_batch(0).conditions.map(lambda tensor: tensor[:1])
            engine = build_engine(run, modules, DiffusionLoss(run, run.seed, null))
            results = [engine.step([make_batch(2 * step), make_batch(2 * step + 1)]) for step in range(3)]
            results.append(engine.step([make_batch(8, height=4), make_batch(9, height=4)]))
            validation = engine.evaluate([make_batch(10)])
            weights = {name: value.detach().clone() for name, value in modules.named_parameters()}
        found[compile] = [(result.loss, result.grad_norm) for result in results], validation, weights
    assert quick_compile == [layer not in broken for layer in range(3)]
    (steps, validation, weights), (expected_steps, expected_validation, expected) = found[True], found[False]
    assert torch.tensor(steps) == pytest.approx(torch.tensor(expected_steps), rel=1e-5)
    assert validation == pytest.approx(expected_validation, rel=1e-5)
    for name, value in expected.items():
        assert (weights[name] - value).norm() < 1e-4 * value.norm(), name


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"parallel": ParallelConfig(context_parallel_size=2)}, "context_parallel_size"),
        ({"parallel": ParallelConfig(2, True)}, "tensor_model_parallel_size"),
        ({"training": {"recompute": Recompute.selective}}, "recompute"),
    ],
)
def test_what_cannot_be_compiled_is_refused(changes: dict, named: str, tmp_path: Path) -> None:
    config = tiny_config(None)
    training = replace(config.training, compile=True, **changes.pop("training", {}))
    with pytest.raises(UserError, match=f"training.compile=true is for blocks without .*{named}"):
        check_layout(replace(config, training=training, **changes), world_size=2)
