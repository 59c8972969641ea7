"""How many steps the quickstart takes: by hand, and of a clock that stands still."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import quickstart_steps


@pytest.mark.parametrize(
    ("seconds", "each", "expected"),
    [
        (420, 0.35, 1200),  # exactly 1200
        (420, 0.3501, 1150),  # 1199.7 steps would fit
        (420, 0.2, 2000),  # 2100 would fit, 2000 are asked for
        (420, 4.0, 400),  # 105 would fit, which show nothing
        (-5, 0.3, 400),  # the time is over before training begins
    ],
)
def test_steps_fill_the_time_in_multiples_of_fifty(seconds: float, each: float, expected: int) -> None:
    assert quickstart_steps.steps_within(seconds, each, most=2000) == expected


def test_the_time_of_a_step_is_the_median_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six steps that compile take ten seconds each; of the twelve that count, seven take two and five take nine."""
    durations = [10.0] * 6 + [2.0] * 7 + [9.0] * 5
    clock = [0.0]

    def step(index: int) -> None:
        clock[0] += durations[index]

    monkeypatch.setattr(quickstart_steps.time, "perf_counter", lambda: clock[0])
    assert quickstart_steps.seconds_per_step(step) == 2.0
