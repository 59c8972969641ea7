"""The shares of a data sheet's rates that a GPU reaches, found from steps that were measured on it."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rmoe_megatron.planning.hardware import Hardware
from rmoe_megatron.planning.listening import Operation
from rmoe_megatron.planning.step_time import arithmetic_seconds, traffic_seconds

# Factors that are tried around the table's shares: from a quarter to four times, 2 % apart.
FACTORS = np.exp(np.linspace(-math.log(4), math.log(4), 141))


@dataclass(frozen=True)
class MeasuredStep:
    """A step on one accelerator: what it computes, and how many seconds it took."""

    operations: Counter[Operation]
    seconds: float


def calibrated(hardware: Hardware, steps: Sequence[MeasuredStep]) -> Hardware:
    """Return the accelerator with those shares at which the roofline comes nearest to the measured times, as ratios.

    Two factors are looked for: one of products and attention, one of traffic with memory.

    Args:
        steps: on one accelerator, which sends nothing.
    """
    times = [_roofline(step.operations, hardware) for step in steps]

    def error(arithmetic: float, traffic: float) -> float:
        return sum(
            math.log(seconds(1 / arithmetic, 1 / traffic) / step.seconds) ** 2
            for seconds, step in zip(times, steps, strict=True)
        )

    _, arithmetic, traffic = min((error(a, t), a, t) for a in FACTORS for t in FACTORS)
    return replace(
        hardware,
        product=float(hardware.product * arithmetic),
        attention=float(hardware.attention * arithmetic),
        element_wise=float(hardware.element_wise * traffic),
    )


def _roofline(operations: Counter[Operation], hardware: Hardware) -> Callable[[float, float], float]:
    """Return a function of two factors, of the time of arithmetic and of that of traffic: the seconds of all operations."""
    counts = np.array(list(operations.values()), dtype=float)
    arithmetic = np.array([arithmetic_seconds(each, hardware) for each in operations])
    traffic = np.array([traffic_seconds(each, hardware) for each in operations])
    floor = np.full(len(counts), hardware.kernel)

    def seconds(slower: float, busier: float) -> float:
        return float(counts @ np.maximum(np.maximum(arithmetic * slower, traffic * busier), floor))

    return seconds
