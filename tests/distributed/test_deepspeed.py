"""DeepSpeed's engine trains as Megatron-Core's does on one process, at every stage of ZeRO.

Compared is all that tests/distributed/test_parity.py compares: gradients of randomised weights, norms, losses, ten clipped steps
of four micro-batches, weights, averages, outputs.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from rmoe_megatron.config.run import DeepSpeedConfig, EngineName, Precision, RunConfig
from tests.distributed.test_parity import MODELS, RECURRENT_RUN, assert_same_run, relative_errors
from tests.support.ranks import Result, run_on_ranks

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


def test_bf16_is_as_close_to_float32_as_megatron_core_s(
    one_process: dict[str, Result], tmp_path: Path
) -> None:
    config = replace(RECURRENT_RUN, precision=Precision.bf16)
    exact = one_process["mmdit-recurrent"]
    megatron = run_on_ranks(1, {"bf16": config}, tmp_path)["bf16"]
    cases = {str(stage): under_zero(config, stage) for stage in STAGES}
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
