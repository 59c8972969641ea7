"""Where a step waits for the device: the listed places, all of them, and no other."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.moe import moe_utils

from rmoe_megatron.config.model import DiffusionConfig, Objective
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.data.batch import Batch, typed_batch
from rmoe_megatron.diffusion.build import build_objective
from rmoe_megatron.diffusion.loss import DiffusionLoss
from rmoe_megatron.engine.megatron.engine import MegatronEngine
from rmoe_megatron.engine.synchronisation import ALLOWED, Recorder
from rmoe_megatron.model.build import build_chunks
from rmoe_megatron.model.recurrence.gate import Gate
from tests.model.test_compile import make_batch
from tests.support.configurations import one_rank, tiny_config
from tests.support.ranks import layout, run_on_ranks

STEP = "rmoe_megatron.engine.megatron.engine:MegatronEngine.step"
BATCHED_PRODUCTS = "rmoe_megatron.model.recurrence.experts:Packing.__init__"
SIZES_ON_CPU = (
    "rmoe_megatron.distributed.megatron_on_cpu:_patch_megatron_core.<locals>.maybe_move_tensor_to_cpu"
)
SIZES = "megatron.core.transformer.moe.moe_utils:maybe_move_tensor_to_cpu"
SPLITS = "megatron.core.transformer.moe.moe_utils:sort_chunks_by_idxs"


def places(config: RunConfig) -> dict[str, int]:
    """Where the second step of a run, of two micro-batches, waits, and how often."""
    with one_rank(config):
        null = make_batch(0).conditions.map(lambda tensor: tensor[:1])
        engine = MegatronEngine(config, build_chunks(config), DiffusionLoss(config, config.seed, null))
        engine.step([make_batch(0), make_batch(1)])
        with Recorder().recording() as recorder:
            engine.step([make_batch(2), make_batch(3)])
        return {place: asked.total() for place, asked in recorder.found.items()}


def test_a_dense_step_waits_once() -> None:
    assert places(tiny_config(None)) == {STEP: 1}


def test_modules_on_one_rank_wait_for_the_longest_group_of_batched_products_alone() -> None:
    found = places(tiny_config())
    assert found.keys() == {STEP, BATCHED_PRODUCTS}
    assert found[STEP] == 1


def test_modules_on_several_ranks_wait_for_the_sizes_of_the_all_to_all(tmp_path: Path) -> None:
    config = replace(tiny_config(), parallel=layout(ep=2))
    found = run_on_ranks(2, {"EP2": config}, tmp_path, places)["EP2"]
    assert found.keys() == {STEP, BATCHED_PRODUCTS, SIZES_ON_CPU, SPLITS}
    assert found[STEP] == 1


def test_nothing_is_listed_that_does_not_exist() -> None:
    assert ALLOWED.keys() == {STEP, BATCHED_PRODUCTS, SIZES_ON_CPU, SPLITS, SIZES}
    assert callable(moe_utils.maybe_move_tensor_to_cpu)  # on a GPU, where nothing stands in for it


@pytest.mark.parametrize(
    "diffusion", [DiffusionConfig(objective=Objective.ddpm, min_snr_gamma=5.0), DiffusionConfig()]
)
def test_an_objective_copies_nothing_to_the_device(diffusion: DiffusionConfig) -> None:
    """Here the device is PyTorch's meta device: a copy to it is one from the host as to any other."""
    config, device = replace(tiny_config(None), diffusion=diffusion), torch.device("meta")
    objective = build_objective(config, device)
    latents = torch.zeros(2, 3, 8, 8, device=device)
    with Recorder().recording() as recorder:
        example = objective.add_noise(latents, torch.zeros(2, dtype=torch.int64, device=device))
        objective.loss(latents.repeat(1, 2 if diffusion.objective is Objective.ddpm else 1, 1, 1), example)
        make_batch(0).to(device)  # does not wait either
    assert not recorder.found


@pytest.mark.parametrize(
    "wait",
    [
        lambda weights: weights.sum().item(), lambda weights: bool((weights > 2).any()), lambda weights: weights.tolist(),
        lambda weights: weights.cpu(), lambda weights: weights.numpy(), lambda weights: weights.nonzero(),
        lambda weights: weights.to("meta"), lambda weights: weights[weights > 0], lambda weights: weights.unique(), lambda weights: float(weights[0, 0]),
    ],
)  # fmt: skip
def test_a_hidden_one_is_found(monkeypatch: pytest.MonkeyPatch, wait: object) -> None:
    original = Gate.gating

    def gating(self: Gate, *inputs: torch.Tensor) -> torch.Tensor:
        logits = original(self, *inputs)
        wait(logits.detach().flatten(0, 1))  # type: ignore[operator]
        return logits

    monkeypatch.setattr(Gate, "gating", gating)
    assert places(tiny_config()).keys() - {STEP, BATCHED_PRODUCTS} == {
        "rmoe_megatron.model.recurrence.gate:Gate.forward"
    }


def test_a_batch_is_as_stored_until_it_is_moved() -> None:
    """Half the bytes go to the device, in one copy a tensor, and become float32 there."""
    stored = typed_batch({
        "latents": torch.randn(2, 3, 8, 8).half(), "text_hidden_states": torch.randn(2, 5, 12).bfloat16(),
        "text_pooled": torch.randn(2, 10).half(), "draw_index": torch.arange(2),
    })  # fmt: skip
    assert isinstance(stored, Batch)
    assert stored.latents.dtype is torch.float16
    moved = stored.to(torch.device("cpu"))
    assert {each.dtype for each in (moved.latents, *moved.conditions.tensors().values())} == {torch.float32}
    assert torch.equal(moved.latents, stored.latents.float())
    assert moved.draw_index.dtype is torch.int64
