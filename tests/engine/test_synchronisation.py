"""Where a step waits for the device: the listed places, all of them, and no other."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rmoe_megatron.config.model import RecurrenceConfig
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.data.batch import Batch, typed_batch
from rmoe_megatron.diffusion.loss import DiffusionLoss
from rmoe_megatron.engine.megatron.engine import MegatronEngine
from rmoe_megatron.engine.synchronisation import ALLOWED, Recorder
from rmoe_megatron.model.build import build_chunks
from rmoe_megatron.model.recurrence.gate import Gate
from tests.model.test_compile import make_batch
from tests.support.configurations import RECURRENCE, one_rank, tiny_config
from tests.support.ranks import layout, run_on_ranks

EVERY_STEP = {
    "rmoe_megatron.engine.megatron.engine:mean_over_data_parallel",
    "megatron.core.optimizer.clip_grads:get_grad_norm_fp32",
    "megatron.core.utils:local_multi_tensor_l2_norm",
}
MODULES = {
    "megatron.core.transformer.moe.moe_utils:sort_chunks_by_idxs",
    "rmoe_megatron.model.recurrence.experts:Packing.__init__",
}
SEVERAL_RANKS = {"rmoe_megatron.platform:_patch_megatron_core.<locals>.maybe_move_tensor_to_cpu"}
GPU = {"megatron.core.transformer.moe.moe_utils:maybe_move_tensor_to_cpu"}


def places(config: RunConfig) -> set[str]:
    """Where the second step of a run waits."""
    with one_rank(config):
        null = make_batch(0).conditions.map(lambda tensor: tensor[:1])
        engine = MegatronEngine(config, build_chunks(config), DiffusionLoss(config, config.seed, null))
        engine.step([make_batch(0), make_batch(1)])
        with Recorder().recording() as recorder:
            engine.step([make_batch(2), make_batch(3)])
        return set(recorder.found)


@pytest.mark.parametrize("recurrence", [None, RECURRENCE])
def test_a_step_waits_at_the_listed_places(recurrence: RecurrenceConfig | None) -> None:
    assert places(tiny_config(recurrence)) == EVERY_STEP | (MODULES if recurrence else set())


def test_experts_on_several_ranks_wait_for_sizes_too(tmp_path: Path) -> None:
    config = replace(tiny_config(), parallel=layout(ep=2))
    found = run_on_ranks(2, {"EP2": config}, tmp_path, places)["EP2"]
    assert found == EVERY_STEP | MODULES | SEVERAL_RANKS


def test_nothing_is_listed_that_does_not_happen() -> None:
    assert ALLOWED.keys() == EVERY_STEP | MODULES | SEVERAL_RANKS | GPU


@pytest.mark.parametrize(
    "wait",
    [
        lambda weights: weights.sum().item(), lambda weights: bool((weights > 2).any()), lambda weights: weights.tolist(),
        lambda weights: weights.cpu(), lambda weights: weights.numpy(), lambda weights: weights.nonzero(),
        lambda weights: weights[weights > 0], lambda weights: weights.unique(), lambda weights: float(weights[0, 0]),
    ],
)  # fmt: skip
def test_a_hidden_one_is_found(monkeypatch: pytest.MonkeyPatch, wait: object) -> None:
    original = Gate.gating

    def gating(self: Gate, *inputs: torch.Tensor) -> torch.Tensor:
        logits = original(self, *inputs)
        wait(logits.detach().flatten(0, 1))  # type: ignore[operator]
        return logits

    monkeypatch.setattr(Gate, "gating", gating)
    assert places(tiny_config()) - EVERY_STEP - MODULES == {
        "rmoe_megatron.model.recurrence.gate:Gate.forward"
    }


def test_a_batch_is_as_stored_until_it_is_moved() -> None:
    """Half the bytes go to the device, in one copy a tensor, and become float32 there."""
    stored = typed_batch({
        "latents": torch.randn(2, 3, 8, 8).half(), "text_hidden_states": torch.randn(2, 5, 12).bfloat16(),
        "text_pooled": torch.randn(2, 10).half(), "sample_index": torch.arange(2),
    })  # fmt: skip
    assert isinstance(stored, Batch)
    assert stored.latents.dtype is torch.float16
    moved = stored.to(torch.device("cpu"))
    assert {each.dtype for each in (moved.latents, *moved.conditions.tensors().values())} == {torch.float32}
    assert torch.equal(moved.latents, stored.latents.float())
    assert moved.sample_index.dtype is torch.int64
