"""The layouts that are tried, and the micro-batches that they are tried with."""

from collections import Counter
from dataclasses import replace

import pytest

from rmoe_megatron.config.model import RecurrenceConfig
from rmoe_megatron.config.run import Recompute, RunConfig
from rmoe_megatron.errors import UserError
from rmoe_megatron.planning import plan as plan_module
from rmoe_megatron.planning import search as search_module
from rmoe_megatron.planning.dry_run import RankUsage, dry_run
from rmoe_megatron.planning.hardware import HARDWARE, Hardware
from rmoe_megatron.planning.listening import Operation
from rmoe_megatron.planning.plan import USABLE
from rmoe_megatron.planning.search import Misfit, accepted_layouts, largest_micro_batch, search
from rmoe_megatron.planning.shallow import two_depths
from rmoe_megatron.planning.step_time import stage_time
from tests.support.configurations import MODEL, RECURRENCE, tiny_config
from tests.support.ranks import MMDIT, layout

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
            each.parallel.tensor_model_parallel_size,
            each.parallel.pipeline_model_parallel_size,
            each.parallel.expert_model_parallel_size,
        )
        for each in accepted_layouts(config, 4)
        if each.training.recompute is Recompute.none
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

    def pretend(config: RunConfig, rank: int, ranks: int, imbalance: float = 1.0) -> RankUsage:
        parallel, training = config.parallel, config.training
        parts = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        recomputes = training.recompute is Recompute.full
        sample = 2e9 if recomputes else 8e9
        stays = round(100e9 / parts)
        found = usage(stays, (1.0 if recomputes else 0.8) / parts)
        return replace(found, activations=round(sample * training.micro_batch_size))

    monkeypatch.setattr(search_module, "dry_run", pretend)
    monkeypatch.setattr(plan_module, "dry_run", pretend)
    config = tiny_config(None, model=MMDIT, training=replace(tiny_config().training, global_batch_size=8))
    plan, estimates, misfits = search(config, 4, with_memory(60e9), 8)
    # What stays is too much by itself: recomputation is not tried.
    assert [(each.config.training.recompute, each.needed, each.stays) for each in misfits] == [
        (Recompute.none, 108e9, True)
    ]
    found = [
        (
            each.config.parallel.tensor_model_parallel_size,
            each.config.parallel.pipeline_model_parallel_size,
            each.config.training.recompute,
            each.config.training.micro_batch_size,
        )
        for each in estimates
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
    rates = [each.samples_per_second for each in estimates]
    assert rates == sorted(rates, reverse=True)
    assert plan is not None
    assert plan.config == estimates[0].config


@pytest.mark.parametrize(
    ("recurrence", "pipeline"),
    [
        (None, 1),
        (replace(RECURRENCE, layers=[1, 3, 5, 7, 9, 11, 13, 15]), 1),
        (replace(RECURRENCE, layers=[2, 9]), 2),
    ],
    ids=["plain", "every second", "two of two stages"],
)
def test_two_depths_say_what_all_blocks_need(recurrence: RecurrenceConfig | None, pipeline: int) -> None:
    """Sixteen blocks, planned whole, need what the line through two shallow plans says."""
    training = replace(tiny_config().training, micro_batch_size=16, global_batch_size=64)
    config = tiny_config(
        recurrence, model=replace(WIDER, num_layers=16), training=training, parallel=layout(pp=pipeline)
    )
    depths = two_depths(config)
    assert depths is not None
    assert depths.second.model.num_layers <= 8
    whole, first, second = (dry_run(each, 0, 2) for each in (config, depths.first, depths.second))
    assert depths.whole(first.peak, second.peak) == pytest.approx(whole.peak, rel=0.01)
    times = [stage_time(each, HARDWARE["h100"], 8, False, False).total for each in (first, second, whole)]
    assert depths.whole(times[0], times[1]) == pytest.approx(times[2], rel=0.02)


def test_blocks_that_are_not_alike_are_all_planned() -> None:
    dual = tiny_config(None, model=replace(WIDER, num_layers=16, dual_attention_layers=[0, 1]))
    assert two_depths(dual) is None
    assert two_depths(tiny_config(None)) is None  # three blocks spare nothing


def test_a_number_of_ranks_without_a_layout_is_refused() -> None:
    with pytest.raises(
        UserError, match="No layout of 7 ranks fits the model and training.global_batch_size=8"
    ):
        search(tiny_config(None), 7, HARDWARE["h100"], 8)
