"""DeepSpeed's engine trains as Megatron-Core's does on one process, at every stage of ZeRO.

Compared is all that tests/distributed/test_parity.py compares: gradients of randomised weights, norms, losses, ten clipped steps
of four micro-batches, weights, averages, outputs.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rmoe_megatron.config.run import DeepSpeedConfig, EngineName, Precision, Recompute, RunConfig
from rmoe_megatron.engine.deepspeed.library import (
    OPTIONS,
    OPTIONS_OF_SPREAD_EXPERTS,
    check_deepspeed,
)
from tests.distributed.test_parity import MODELS, RECURRENT_RUN, assert_same_run, relative_errors
from tests.support.ranks import Result, batches, conditions, layout, run_on_ranks, train

STAGES = (1, 2, 3)


def under_zero(config: RunConfig, stage: int, **settings: object) -> RunConfig:
    return replace(
        config, engine=EngineName.deepspeed, deepspeed=DeepSpeedConfig(zero_stage=stage, **settings)
    )


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return run_on_ranks(1, MODELS, tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize(
    ("ranks", "models"),
    [
        (2, ["mmdit-recurrent", "dit"]),
        pytest.param(1, [*MODELS], marks=pytest.mark.distributed_full),
        pytest.param(2, [*MODELS], marks=pytest.mark.distributed_full),
        pytest.param(4, [*MODELS], marks=pytest.mark.distributed_full),
    ],
)
def test_every_stage_trains_as_one_process(
    ranks: int, models: list[str], one_process: dict[str, Result], tmp_path: Path
) -> None:
    cases = {f"{model} {stage}": under_zero(MODELS[model], stage) for model in models for stage in STAGES}
    for name, result in run_on_ranks(ranks, cases, tmp_path).items():
        assert_same_run(result, one_process[name.split()[0]])


@pytest.mark.parametrize(
    ("ranks", "expert_ranks"), [(2, 2), pytest.param(4, 2, marks=pytest.mark.distributed_full), (4, 4)]
)
def test_modules_that_are_spread_train_as_on_one_process(
    ranks: int, expert_ranks: int, one_process: dict[str, Result], tmp_path: Path
) -> None:
    cases = {
        f"{model} {stage}": replace(under_zero(config, stage), parallel=layout(ep=expert_ranks))
        for model, config in MODELS.items()
        for stage in (1, 2)
        if config.recurrence is not None and model != "mmdit-last-block"
    }
    assert len(cases) == 6
    for name, result in run_on_ranks(ranks, cases, tmp_path).items():
        assert_same_run(result, one_process[name.split()[0]])


def test_bf16_is_as_close_to_float32_as_megatron_core_s(
    one_process: dict[str, Result], tmp_path: Path
) -> None:
    config = replace(RECURRENT_RUN, precision=Precision.bf16)
    exact = one_process["mmdit-recurrent"]
    megatron = run_on_ranks(1, {"bf16": config}, tmp_path)["bf16"]
    cases = {str(stage): under_zero(config, stage) for stage in STAGES}
    cases |= {f"EP2 {stage}": replace(cases[str(stage)], parallel=layout(ep=2)) for stage in (1, 2)}
    for result in run_on_ranks(2, cases, tmp_path).values():
        for tensors in ("gradients", "final", "averages"):
            theirs, ours = (
                relative_errors(getattr(run, tensors), getattr(exact, tensors)) for run in (megatron, result)
            )
            assert 0 < theirs.mean() < 0.5
            assert ours.mean() < 1.25 * theirs.mean()
            assert ours.max() < 2 * theirs.max()
        assert result.losses == pytest.approx(megatron.losses, rel=1e-2)
        assert result.grad_norms == pytest.approx(megatron.grad_norms, rel=2e-2)


# Of every option another value than DeepSpeed's own.
VALUES: dict[str, object] = {
    "allgather_bucket_size": 3000, "allgather_partitions": False, "contiguous_gradients": False, "overlap_comm": True,
    "reduce_bucket_size": 3000, "reduce_scatter": False, "round_robin_gradients": True, "stage3_max_live_parameters": 2000,
    "stage3_max_reuse_distance": 1000, "stage3_prefetch_bucket_size": 1000, "sub_group_size": 5000, "zero_hpz_partition_size": 2,
}  # fmt: skip
ON_THE_HOST = {
    f"{name} {stage}": under_zero(RECURRENT_RUN, stage, **dict.fromkeys(name.split(), True))
    for name, stages in {"offload_optimizer": STAGES, "offload_parameters": (3,), "offload_optimizer offload_parameters": (3,)}.items()
    for stage in stages
}  # fmt: skip
WITH_OPTIONS = {
    f"{name} {stage}": under_zero(RECURRENT_RUN, stage, engine_options={name: VALUES[name] if stage < 3 or name != "overlap_comm" else False})
    for name, stages in OPTIONS.items()
    for stage in stages
}  # fmt: skip
RECOMPUTED = {
    f"{recompute.value} {stage}": replace(
        under_zero(RECURRENT_RUN, stage), training=replace(RECURRENT_RUN.training, recompute=recompute)
    )
    for recompute, stages in {Recompute.full: STAGES, Recompute.selective: (1,)}.items()
    for stage in stages
}
SPREAD = {
    f"spread, {name}": replace(case, parallel=layout(ep=2))
    for name, case in (ON_THE_HOST | WITH_OPTIONS).items()
    if name[-1] in "12" and name.split()[0] in ("offload_optimizer", *OPTIONS_OF_SPREAD_EXPERTS)
}
SHORT = ("offload_optimizer 2", "offload_optimizer offload_parameters 3", "reduce_bucket_size 2", "sub_group_size 3", "spread, overlap_comm 2", "full 3")  # fmt: skip


@pytest.mark.parametrize(
    "names",
    [
        SHORT,
        pytest.param(ON_THE_HOST, marks=pytest.mark.distributed_full),
        pytest.param(WITH_OPTIONS, marks=pytest.mark.distributed_full),
        pytest.param(SPREAD, marks=pytest.mark.distributed_full),
        pytest.param(RECOMPUTED, marks=pytest.mark.distributed_full),
    ],
    ids=["short", "host", "options", "spread", "recomputed"],
)
def test_where_things_lie_and_how_they_get_there_changes_nothing_else(
    names: Iterable[str], one_process: dict[str, Result], tmp_path: Path
) -> None:
    cases = {name: (ON_THE_HOST | WITH_OPTIONS | SPREAD | RECOMPUTED)[name] for name in names}
    for config in cases.values():
        check_deepspeed(config, 2)
    # DeepSpeed does not hand out gradients wherever they lie; norms and ten steps' weights say as much.
    expected = replace(one_process["mmdit-recurrent"], gradients={})
    for result in run_on_ranks(2, cases, tmp_path, partial(train, gradients=False)).values():
        assert_same_run(result, expected)


class SpoiltGradient(torch.autograd.Function):
    """Passes a finite loss on and gives it a gradient that is not finite."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.nan


def finish(
    config: RunConfig, spoilt: int | None = None
) -> tuple[list[float], list[bool], dict[str, torch.Tensor]]:
    """Take four steps, before which one more may be spoilt on the last rank; norms, whether a step was left out, weights."""
    from rmoe_megatron.diffusion.loss import DiffusionLoss
    from rmoe_megatron.distributed.process_groups import process_groups
    from rmoe_megatron.engine.registry import build_engine
    from rmoe_megatron.model.build import build_chunks

    norms, left_out = [], []
    with process_groups(config) as device:
        modules = build_chunks(config).to(device)
        null = conditions(config, torch.zeros(1)).map(torch.zeros_like)
        engine: Any = build_engine(config, modules, DiffusionLoss(config, config.seed, null))
        loss_of = engine._loss
        steps = list(batches(config))[:4]
        order = [*steps[:1], *([steps[3]] if spoilt is not None else []), *steps[1:]]
        for number, micro_batches in enumerate(order):
            is_spoilt = spoilt is not None and number == 1
            calls = iter(range(len(micro_batches)))

            def loss(batch: Any, is_spoilt: bool = is_spoilt, calls: Any = calls) -> torch.Tensor:
                value = loss_of(batch)
                hit = next(calls) == spoilt and is_spoilt and dist.get_rank() == dist.get_world_size() - 1
                return SpoiltGradient.apply(value) if hit else value

            engine._loss = loss
            outcome = engine.step(micro_batches)
            left_out.append(outcome.suspects is not None)
            if not is_spoilt:
                norms.append(outcome.grad_norm)
        weights = {name: parameter.detach().float().cpu() for name, parameter in engine.parameters.items()}
    return norms, left_out, weights


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
def test_a_gradient_that_is_not_finite_on_one_rank_is_left_out_and_leaves_nothing(
    precision: Precision, tmp_path: Path
) -> None:
    base = replace(RECURRENT_RUN, precision=precision)
    cases = {
        f"{stage} {host}": under_zero(base, stage, offload_optimizer=host)
        for stage in STAGES
        for host in (False, True)
    }
    expected = run_on_ranks(2, cases, tmp_path, finish)
    for name, found in run_on_ranks(2, cases, tmp_path, partial(finish, spoilt=1)).items():
        assert found[1] == [False, True, False, False, False], name
        assert found[0] == expected[name][0], name
        assert all(torch.equal(found[2][key], weight) for key, weight in expected[name][2].items()), name


def finite_at_the_start(config: RunConfig) -> bool:
    """Whether every rank's shards are finite if memory is as bad as it can be."""
    from rmoe_megatron.diffusion.loss import DiffusionLoss
    from rmoe_megatron.distributed.process_groups import process_groups
    from rmoe_megatron.engine.registry import build_engine
    from rmoe_megatron.model.build import build_chunks

    # It fills memory that is not initialised with NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    with process_groups(config) as device:
        modules = build_chunks(config).to(device)
        null = conditions(config, torch.zeros(1)).map(torch.zeros_like)
        engine = build_engine(config, modules, DiffusionLoss(config, config.seed, null))
        engine.step(next(iter(batches(config))))
        finite = torch.tensor(all(bool(each.isfinite().all()) for each in engine.parameters.values()))
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    return bool(finite)


def test_what_fills_up_shards_is_finite(tmp_path: Path) -> None:
    """On three ranks, which divide no parameter of the model."""
    training = replace(RECURRENT_RUN.training, global_batch_size=6)
    cases = {str(stage): under_zero(replace(RECURRENT_RUN, training=training), stage) for stage in STAGES}
    assert all(run_on_ranks(3, cases, tmp_path, finite_at_the_start).values())
