"""Averages of a model in bf16 follow the optimizer's float32 weights, not their rounded copies, in every way these are spread.

At a learning rate of 1e-5 most updates are smaller than half a rounding step of bf16, so that the parameters themselves hardly
move. The reference is the movement of the averages of the same run in float32.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rmoe_megatron.config.run import DeepSpeedConfig, EngineName, Precision, RunConfig
from tests.support.ranks import (
    MMDIT,
    batches,
    conditions,
    configuration,
    gathered,
    layout,
    perturb,
    places_of,
    run_on_ranks,
    saved_and_resumed,
    whole,
)

BASE = configuration(MMDIT, recurrent=True)
FLOAT32 = replace(
    BASE, optimizer=replace(BASE.optimizer, learning_rate=1e-5, weight_decay=0.0, clip_grad=0.0)
)
BF16 = replace(FLOAT32, precision=Precision.bf16)
REPLICATED = replace(BF16.optimizer, distributed_optimizer=False)
CASES = {
    "DP2": replace(BF16, parallel=layout(overlap_grad_reduce=True, overlap_param_gather=True)),
    "DP2-replicated": replace(BF16, optimizer=REPLICATED),
    "EP2": replace(BF16, parallel=layout(ep=2)),
    "PP2": replace(BF16, parallel=layout(pp=2)),
    "TP2": replace(BF16, parallel=layout(tp=2)),
    **{
        f"ZeRO {stage}": replace(
            BF16, engine=EngineName.deepspeed, deepspeed=DeepSpeedConfig(zero_stage=stage)
        )
        for stage in (1, 2, 3)
    },
}


def movement(config: RunConfig) -> dict[str, dict[str, Tensor]]:
    """How far averages and parameters have moved after the steps, by name; the run is saved and resumed on the way."""
    from rmoe_megatron.diffusion.loss import DiffusionLoss
    from rmoe_megatron.distributed.process_groups import process_groups
    from rmoe_megatron.engine.registry import build_engine
    from rmoe_megatron.model.build import build_chunks
    from rmoe_megatron.training.ema import ExponentialMovingAverage

    with process_groups(config) as device:
        modules = build_chunks(config).to(device)
        null = conditions(config, torch.zeros(1)).map(torch.zeros_like)
        perturb(modules)
        places = places_of(modules)
        start = gathered(places, dict(modules.named_parameters()))
        engine = build_engine(config, modules, DiffusionLoss(config, config.seed, null))
        ema = ExponentialMovingAverage(engine.parameters, 0.7, main_weights=engine.main_weights)
        for number, micro_batches in enumerate(batches(config)):
            engine.step(micro_batches)
            engine.gather_parameters()
            ema.update(number)
            if number == 5:
                engine, ema, places = saved_and_resumed(engine, ema, config)
        ema.complete()
        ends = {
            "averages": gathered(places, whole(engine, ema.averages)),
            "parameters": gathered(places, whole(engine, engine.parameters)),
        }
    return {kind: {name: end[name] - start[name] for name in start} for kind, end in ends.items()}


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return run_on_ranks(1, {"one": FLOAT32}, tmp_path_factory.mktemp("one"), movement)["one"]["averages"]


def far(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The relative error of all tensors together."""
    assert found.keys() == expected.keys()
    names = list(expected)
    ours, theirs = (torch.cat([each[name].flatten() for name in names]) for each in (found, expected))
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize(
    "names",
    [
        ["DP2", "DP2-replicated", "EP2", "ZeRO 1", "ZeRO 3"],
        pytest.param([*CASES], marks=pytest.mark.distributed_full),
    ],
    ids=["some", "all"],
)
def test_averages_move_as_in_float32(names: list[str], float32: dict[str, Tensor], tmp_path: Path) -> None:
    one = run_on_ranks(1, {"one": BF16}, tmp_path, movement)["one"]
    found = run_on_ranks(2, {name: CASES[name] for name in names}, tmp_path, movement)
    errors = {name: far(case["averages"], float32) for name, case in {"one": one, **found}.items()}
    # Adam turns the rounding of gradients in bf16 into movement; the rounded parameters are as far as what they lose.
    assert far(one["parameters"], float32) > 2 * errors["one"]
    assert max(errors.values()) < 1.1 * errors["one"], errors
