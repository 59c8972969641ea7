"""The goals of the step benchmarks: those that were set, by width, precision and processor."""

import pytest
from benchmark_goals import compiled_goal, dense_goal, judged, recurrence_goal

from rmoe_megatron.config.run import Precision


@pytest.mark.parametrize(
    ("width", "precision", "bf16_is_fast", "expected"),
    [
        (192, Precision.bf16, True, 0.45),
        (256, Precision.bf16, True, 0.50),
        (768, Precision.bf16, True, 0.80),
        (192, Precision.fp32, True, 0.75),
        (256, Precision.fp32, False, 0.80),
        (768, Precision.fp32, False, 0.92),
        (192, Precision.bf16, False, None),
    ],
)
def test_dense_goals(width: int, precision: Precision, bf16_is_fast: bool, expected: float | None) -> None:
    assert dense_goal(width, precision, bf16_is_fast) == expected


def test_the_others() -> None:
    assert [recurrence_goal(width) for width in (192, 256, 768)] == [1.18, 1.10, 1.10]
    assert compiled_goal(Precision.bf16, bf16_is_fast=True) == 0.85
    assert compiled_goal(Precision.bf16, bf16_is_fast=False) is None
    assert compiled_goal(Precision.fp32, bf16_is_fast=True) is None


def test_a_ratio_is_judged() -> None:
    assert judged(0.451, 0.45) == "0.451 (goal: at most 0.45, not reached)"
    assert judged(0.45, 0.45) == "0.450 (goal: at most 0.45, reached)"
    assert judged(0.9, None) == "0.900 (no goal for this device and precision)"
