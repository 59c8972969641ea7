"""The learning rate of every step, against values worked out by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from rmoe_megatron.config.run import LearningRateDecay, OptimizerConfig, RunConfig
from rmoe_megatron.config.validation import validate
from rmoe_megatron.engine.lr_schedule import build_schedule
from rmoe_megatron.errors import UserError
from tests.support.configurations import tiny_config


def configuration(**settings: object) -> RunConfig:
    """Ten steps, two of them warm-up to a peak of 8e-4."""
    config = tiny_config()
    training = replace(config.training, steps=10)
    optimizer = OptimizerConfig(learning_rate=8e-4, warmup_steps=2)
    return replace(config, training=training, optimizer=replace(optimizer, **settings))


def rates(config: RunConfig, resumed_after: int | None = None) -> list[float]:
    """The learning rate before the first step and after each, in units of 1e-4."""
    optimizer = SimpleNamespace(param_groups=[{"wd_mult": 1.0}])
    schedule = build_schedule(config, optimizer)
    found = [optimizer.param_groups[0]["lr"]]
    for step in range(1, 11):
        schedule.step(1)
        if step == resumed_after:
            state, schedule = schedule.state_dict(), build_schedule(config, optimizer)
            schedule.load_state_dict(state)
        found.append(optimizer.param_groups[0]["lr"])
    return [1e4 * rate for rate in found]


CASES = {
    # Half a cosine over eight steps: (1 + cos(pi k / 8)) / 2 is 0.8535533906 at k = 2, 1/2 at 4 and 0.1464466094 at 6.
    "cosine": ({}, {0: 0, 1: 4, 2: 8, 4: 8 * 0.8535533906, 6: 4, 8: 8 * 0.1464466094, 10: 0}),
    "linear": ({"lr_decay_style": LearningRateDecay.linear}, {1: 4, 2: 8, 4: 6, 6: 4, 8: 2, 10: 0}),
    "linear, to a quarter": (
        {"lr_decay_style": LearningRateDecay.linear, "min_learning_rate": 2e-4},
        {2: 8, 6: 5, 10: 2},
    ),
    "constant": ({"lr_decay_style": LearningRateDecay.constant}, {1: 4, 2: 8, 6: 8, 10: 8}),
    "wsd": (
        {"lr_decay_style": LearningRateDecay.wsd, "wsd_decay_steps": 4},
        {1: 4, 2: 8, 6: 8, 7: 6, 8: 4, 9: 2, 10: 0},
    ),
}


@pytest.mark.parametrize(("settings", "expected"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("resumed_after", [None, 1, 7])
def test_the_rate_of_a_step(settings: dict, expected: dict[int, float], resumed_after: int | None) -> None:
    config = configuration(**settings)
    validate(config, 1)
    found = rates(config, resumed_after)
    assert {step: found[step] for step in expected} == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr_decay_style": LearningRateDecay.wsd}, "wsd_decay_steps belongs to lr_decay_style=wsd"),
        ({"wsd_decay_steps": 4}, "this run has lr_decay_style=cosine"),
        ({"lr_decay_style": LearningRateDecay.wsd, "wsd_decay_steps": 9}, "without the 2 steps of warm-up"),
        ({"lr_decay_style": LearningRateDecay.constant, "min_learning_rate": 1e-5}, "is never reached"),
    ],
)
def test_what_never_takes_effect_is_refused(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        validate(configuration(**settings), 1)
