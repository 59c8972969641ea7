"""Shares are found again from times that a roofline with other shares gives, worked out by hand."""

from collections import Counter
from dataclasses import replace

import pytest

from rmoe_megatron.planning.calibration import MeasuredStep, calibrated
from rmoe_megatron.planning.listening import Operation
from tests.planning.test_step_time import ROUND

PRODUCT = Operation("product", "forward", "bfloat16", flops=10**12, bytes=0)
ATTENTION = Operation("attention", "forward", "bfloat16", flops=10**12, bytes=0)
COPY = Operation("copy", "forward", "bfloat16", flops=0, bytes=10**10)


def test_shares_are_found_from_measured_steps() -> None:
    """A GPU of 100 TFLOP/s of which products reach 40 % and attention 20 %, and of 1 TB/s of which 25 % are reached.

    A product takes 1 / 40 s, attention 1 / 20 s, a copy of 10 GB 1 / 25 s. The table says 50, 25 and 50 %.
    """
    steps = [
        MeasuredStep(Counter({PRODUCT: 40, ATTENTION: 20}), 2.0),
        MeasuredStep(Counter({PRODUCT: 40, COPY: 25}), 2.0),
        MeasuredStep(Counter({PRODUCT: 4, COPY: 100}), 4.1),
    ]
    found = calibrated(ROUND, steps)
    assert found.product == pytest.approx(0.40, rel=0.02)
    assert found.attention == pytest.approx(0.20, rel=0.02)
    assert found.element_wise == pytest.approx(0.25, rel=0.02)
    assert replace(found, product=0.5, attention=0.25, element_wise=0.5) == ROUND
