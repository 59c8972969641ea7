"""Learning rates of parts of the model: base, recurrence and gate each move by their own, in both engines, every layout and after a resume."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from rmoe_megatron.config.loading import load_config
from rmoe_megatron.config.run import EngineName, GroupLearningRates, RunConfig
from rmoe_megatron.config.validation import validate
from rmoe_megatron.diffusion.loss import DiffusionLoss
from rmoe_megatron.engine.registry import build_engine
from rmoe_megatron.errors import UserError
from rmoe_megatron.model.build import build_chunks
from rmoe_megatron.training import run
from tests.model.test_compile import make_batch
from tests.support.configurations import one_rank, randomise, tiny_config
from tests.support.ranks import MMDIT, configuration, layout, run_on_ranks, train
from tests.support.runs import losses, make_run

RATES = {"base": 1e-3, "recurrence": 4e-3, "gate": 2e-4}  # learning_rate itself is the base's
OWN = GroupLearningRates(recurrence=4e-3, gate=2e-4)


def part_of(name: str) -> str:
    """Which part of the model a parameter is, told by its name."""
    if "recurrence" not in name:
        return "base"
    return "gate" if "gate" in name else "recurrence"


def with_rates(config: RunConfig, rates: GroupLearningRates = OWN, **changes: object) -> RunConfig:
    return replace(config, optimizer=replace(config.optimizer, group_learning_rates=rates, **changes))


@pytest.mark.parametrize("engine_name", list(EngineName))
def test_the_first_step_of_adam_moves_a_weight_by_its_learning_rate(engine_name: EngineName) -> None:
    """Its moments are the gradient and the square of it: what is left of them is the gradient's sign, or 0 where that is 0."""
    settings = {"warmup_steps": 0, "eps": 1e-20, "clip_grad": 0.0, "weight_decay": 0.0}
    config = with_rates(replace(tiny_config(), engine=engine_name), **settings)
    with one_rank(config):
        modules = build_chunks(config)
        randomise(modules)
        before = {name: value.detach().clone() for name, value in modules.named_parameters()}
        null = make_batch(0).conditions.map(lambda tensor: tensor[:1])
        engine = build_engine(config, modules, DiffusionLoss(config, 0, null))
        result = engine.step([make_batch(1)])
        engine.gather_parameters()
        moved = {name: (value.detach() - before[name]).abs() for name, value in modules.named_parameters()}
    assert result.learning_rate == pytest.approx(1e-3)
    for part, rate in RATES.items():
        of_part = [value for name, value in moved.items() if part_of(name) == part]
        assert len(of_part) > 1, part
        values = torch.cat([value.flatten() for value in of_part])
        moving = values[values > rate / 100]
        assert len(moving) > len(values) / 4, part
        assert moving.min().item() == pytest.approx(rate, rel=1e-3), part
        assert moving.max().item() == pytest.approx(rate, rel=1e-3), part


def test_the_schedules_are_in_proportion() -> None:
    """Warm-up over 2 steps, then a cosine to a tenth at step 20: of the gates as of the rest, by the quotient of their peaks."""
    config = with_rates(tiny_config(), warmup_steps=2, min_learning_rate=1e-4)
    with one_rank(config):
        modules = build_chunks(config)
        null = make_batch(0).conditions.map(lambda tensor: tensor[:1])
        engine = build_engine(config, modules, DiffusionLoss(config, 0, null))
        for step in range(6):
            height = step / 2 if step < 2 else 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / 18)) / 2
            rates = {group["lr"] for group in engine.optimizer.param_groups}  # type: ignore[attr-defined]
            assert sorted(rates) == pytest.approx(
                [rate * height for rate in (2e-4, 1e-3, 4e-3)] if height else [0.0]
            )
            assert engine.step([make_batch(step)]).learning_rate == pytest.approx(1e-3 * height)


def test_layouts_and_resumes_change_nothing(tmp_path: Path) -> None:
    model = with_rates(configuration(MMDIT, recurrent=True))
    zero = replace(model, engine=EngineName.deepspeed)
    one = run_on_ranks(1, {"whole": model, "equal": with_rates(model, GroupLearningRates())}, tmp_path, train)
    moved = {
        part: max((one["whole"].final[name] - one["equal"].final[name]).abs().max().item() for name in one["whole"].final if part_of(name) == part)
        for part in RATES
    }  # fmt: skip
    assert min(moved.values()) > 1e-4, moved  # the rates have their effect
    cases = {
        "TP2": replace(model, parallel=layout(tp=2)),
        "PP2": replace(model, parallel=layout(pp=2)),
        "EP2": replace(model, parallel=layout(ep=2)),
        "ZeRO": zero,
    }
    for name, found in run_on_ranks(2, cases, tmp_path, partial(train, gradients=False)).items():
        assert found.losses == pytest.approx(one["whole"].losses, abs=1e-4), name
    resumed = {"EP2": cases["EP2"], "ZeRO": zero, "plain": with_rates(model, distributed_optimizer=False)}
    straight = run_on_ranks(2, resumed, tmp_path, partial(train, gradients=False))
    for name, found in run_on_ranks(
        2, resumed, tmp_path, partial(train, gradients=False, resumes=True)
    ).items():
        for key, value in found.final.items():
            assert torch.equal(value, straight[name].final[key]), (name, key)


def test_a_resumed_run_may_have_other_rates_of_the_same_groups(tmp_path: Path) -> None:
    gate = "optimizer.group_learning_rates.gate"
    settings = [
        "training.steps=2",
        "training.sample_prompts=[]",
        "optimizer.warmup_steps=1",
        "data.validation=null",
    ]
    run.train(load_config(make_run(tmp_path), [*settings, f"{gate}=1.0e-4"]))
    run.resume(tmp_path / "run", ["training.steps=4", f"{gate}=1.0e-5"])
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4]
    for override in (f"{gate}=null", "optimizer.group_learning_rates.base=1.0e-4"):
        with pytest.raises(UserError, match="was trained with learning rates of their own for gate"):
            run.resume(tmp_path / "run", ["training.steps=6", override])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["recurrence=null", "optimizer.group_learning_rates.gate=1e-3"], "group_learning_rates.gate is for a model with a recurrence"),
        (
            ["fine_tuning.base={folder}/base", "optimizer.group_learning_rates.base=1e-3"],
            "group_learning_rates.base is for a base that is trained",
        ),
        (["optimizer.group_learning_rates.gate=0"], "optimizer.group_learning_rates.gate"),
    ],
)  # fmt: skip
def test_rates_of_what_is_not_trained_are_refused(tmp_path: Path, overrides: list[str], words: str) -> None:
    config = load_config(make_run(tmp_path), [each.format(folder=tmp_path) for each in overrides])
    with pytest.raises(UserError) as error:
        validate(config, world_size=1)
    assert words in str(error.value)
