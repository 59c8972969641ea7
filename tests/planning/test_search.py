"""The layouts that are tried, and the micro-batches that they are tried with."""

from collections import Counter
from dataclasses import replace

import pytest

from rmoe_megatron.config.run import Recompute, RunConfig
from rmoe_megatron.errors import UserError
from rmoe_megatron.planning import plan as plan_module
from rmoe_megatron.planning import search as search_module
from rmoe_megatron.planning.dry_run import RankUsage, dry_run
from rmoe_megatron.planning.hardware import HARDWARE, Hardware
from rmoe_megatron.planning.listening import Operation
from rmoe_megatron.planning.plan import USABLE
from rmoe_megatron.planning.search import Misfit, accepted_layouts, largest_micro_batch, search
from tests.support.configurations import MODEL, RECURRENCE, tiny_config
from tests.support.ranks import MMDIT

WIDER = replace(
    MODEL, hidden_size=64, num_attention_heads=2, num_layers=4, sample_size=16, pos_embed_max_size=8
)


def with_memory(memory: float) -> Hardware:
    return replace(HARDWARE["h100"], memory=memory / USABLE)


def test_layouts_of_four_ranks() -> None:
    """Four heads and four blocks, four modules: tensor 8 and pipeline 8 need more ranks, and modules fill a pipeline stage's ranks."""
    config = tiny_config(RECURRENCE, model=MMDIT)
    found = {
        (
            layout.parallel.tensor_model_parallel_size,
            layout.parallel.pipeline_model_parallel_size,
            layout.parallel.expert_model_parallel_size,
        )
        for layout in accepted_layouts(config, 4)
        if layout.training.recompute is Recompute.none
    }
    # 8 samples a step: as many replicas as 4 / (tensor x pipeline); experts up to the ranks of a stage.
    assert found == {
        (1, 1, 1), (1, 1, 2), (1, 1, 4), (1, 2, 1), (1, 2, 2), (1, 4, 1),
        (2, 1, 1), (2, 1, 2), (2, 1, 4), (2, 2, 1), (2, 2, 2), (4, 1, 1), (4, 1, 2), (4, 1, 4),
    }  # fmt: skip


def test_the_micro_batch_is_the_largest_that_fits() -> None:
    """The line through one and two samples is right for those that are not tried."""
    config = tiny_config(None, model=WIDER, training=replace(tiny_config().training, global_batch_size=16))
    peaks = {
        size: dry_run(replace(config, training=replace(config.training, micro_batch_size=size)), 0, 1).peak
        for size in (4, 8)
    }
    found = largest_micro_batch(config, 1, with_memory(peaks[8] * 1.001))
    assert not isinstance(found, Misfit)
    assert found.training.micro_batch_size == 8
    found = largest_micro_batch(config, 1, with_memory(peaks[8] * 0.999))
    assert not isinstance(found, Misfit)
    assert found.training.micro_batch_size == 4
    assert isinstance(largest_micro_batch(config, 1, with_memory(peaks[4] / 10)), Misfit)


def usage(peak: int, seconds: float) -> RankUsage:
    """A stage that computes for so long on the hardware of these tests."""
    work = Operation("product", "forward", "bfloat16", flops=round(seconds * 989e12 * 0.65), bytes=0)
    return RankUsage(
        0, parameters=peak, gradients=0, averages=0, optimizer=0, activations=0, operations=Counter({work: 1}),
        collectives=Counter(), micro_batches=4,
    )  # fmt: skip


def test_the_fastest_comes_first_and_what_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 100 GB on four GPUs of 60: halves fit, with one sample of 8 GB each or, recomputed, four of 2 GB; so do quarters.

    A recomputed sample takes a second on one rank, another 0.8 s; a pipeline of two waits a quarter of its time for four micro-batches.
    """

    def pretend(config: RunConfig, rank: int, ranks: int) -> RankUsage:
        parallel, training = config.parallel, config.training
        parts = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        recomputes = training.recompute is Recompute.full
        sample = 2 if recomputes else 8
        peak = (100 + parts * sample * training.micro_batch_size) / parts
        return usage(round(peak * 1e9), (1.0 if recomputes else 0.8) / parts)

    monkeypatch.setattr(search_module, "dry_run", pretend)
    monkeypatch.setattr(plan_module, "dry_run", pretend)
    config = tiny_config(None, model=MMDIT, training=replace(tiny_config().training, global_batch_size=8))
    plans, misfits = search(config, 4, with_memory(60e9), 8)
    assert {(misfit.config.training.recompute, misfit.needed) for misfit in misfits} == {
        (Recompute.none, 108e9), (Recompute.selective, 108e9), (Recompute.full, 102e9),
    }  # fmt: skip
    found = [
        (
            plan.config.parallel.tensor_model_parallel_size,
            plan.config.parallel.pipeline_model_parallel_size,
            plan.config.training.recompute,
            plan.config.training.micro_batch_size,
        )
        for plan in plans
    ]
    # Of two parts 60 - 50 = 10 GB are free: one sample of 8, or four of 2. Of four 35 GB: four samples of 8, or eight of 2.
    halves = {
        (tensor, 2 // tensor, how, 1) for tensor in (1, 2) for how in (Recompute.none, Recompute.selective)
    }
    halves |= {(tensor, 2 // tensor, Recompute.full, 4) for tensor in (1, 2)}
    assert halves <= set(found)
    assert (4, 1, Recompute.none, 4) in found
    assert (4, 1, Recompute.full, 8) in found
    assert found[0] == (4, 1, Recompute.none, 4)
    rates = [plan.samples_per_second for plan in plans]
    assert rates == sorted(rates, reverse=True)


def test_a_number_of_ranks_without_a_layout_is_refused() -> None:
    with pytest.raises(
        UserError, match="No layout of 7 ranks fits the model and training.global_batch_size=8"
    ):
        search(tiny_config(None), 7, HARDWARE["h100"], 8)
