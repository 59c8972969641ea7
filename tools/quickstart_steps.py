"""Prints how many training steps the quickstart has time for on this machine.

    python tools/quickstart_steps.py configs/shapes_tiny.yaml --seconds 420

Steps of the configuration's own model and batch are timed here and now, because machines of one kind differ by a factor of two and more. The
result is a multiple of 50 between the fewest steps after which pictures show anything and what the configuration asks for.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from benchmark_step import megatron_step

from rmoe_megatron.config.loading import load_config
from rmoe_megatron.distributed.process_groups import process_groups
from rmoe_megatron.model.precision.backend import resolve_precision

FEWEST, MULTIPLE = 400, 50
WARM_UP, TIMED = 6, 12


def seconds_per_step(step: Callable[[int], None]) -> float:
    """Return the median time of a step after those that compile kernels."""
    seconds = []
    for index in range(WARM_UP + TIMED):
        started = time.perf_counter()
        step(index)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM_UP:])


def steps_within(seconds: float, each: float, most: int) -> int:
    """Return how many steps of ``each`` seconds fit into ``seconds``: a multiple of 50, at least 400 and at most ``most``."""
    fitting = int(seconds / each) // MULTIPLE * MULTIPLE
    return min(max(fitting, FEWEST), most)


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--seconds", type=float, required=True, help="what the training may take")
    arguments = parser.parse_args()
    config = resolve_precision(load_config(arguments.config, []))
    with process_groups(config) as device:
        each = seconds_per_step(megatron_step(config, device))
    print(steps_within(arguments.seconds, each, config.training.steps))


if __name__ == "__main__":
    main()
