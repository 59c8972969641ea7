"""Runs what only a GPU can tell, in minutes, and skips by name what is missing.

    python tools/gpu_check.py [--output runs/gpu_check] [--only NAME ...] [--minutes 8]
    python tools/gpu_check.py --device cpu --small      # the same code on tiny models

One H100 or H200 with what NGC's PyTorch image or ``pip install rmoe-megatron[train,gpu,deepspeed]`` has. Writes to the output folder:
gpu_check.json (all figures), gpu_check.md (the row for tools/benchmark_results.md, goals, checks, dearest operations) and
gpu_check_timeline.json (two steps, for chrome://tracing or Perfetto). The exit code is 1 if a check fails.
"""

import argparse
import logging
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import ledger
import torch
from gpu_check_engines import parity_deepspeed
from gpu_check_parity import (
    grouped_products,
    parity_bf16,
    parity_fp8,
    parity_fp32,
    parity_transformer_engine,
)
from gpu_check_report import FIGURES, Report, Result, environment
from gpu_check_speed import against_diffusers, speed, speed_fp8, synchronisations, timeline
from gpu_check_workplace import CAPABILITIES, Figures, Skipped, Workplace, parity_model, run_config

from rmoe_megatron.config.run import Device, Fp8Recipe, Precision
from rmoe_megatron.distributed.process_groups import process_groups
from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic
from rmoe_megatron.files.foreign_errors import reason


@dataclass(frozen=True)
class Check:
    """One thing to find out.

    Args:
        seconds: how long it takes on an H100, at most; it is not begun with less time left.
    """

    name: str
    run: Callable[[Workplace], Figures]
    seconds: float


def _fp8(workplace: Workplace, recipe: Fp8Recipe) -> Figures:
    """Hold a recipe's step to bf16's, then measure its speed."""
    return parity_fp8(workplace, recipe) | speed_fp8(workplace, recipe)


# Those that follow one another share a trainer; what may be missing, or what takes longest, comes last.
CHECKS = [
    Check("parity_fp32", parity_fp32, 60),
    Check("parity_bf16", parity_bf16, 15),
    Check("grouped_mm_fp32", partial(grouped_products, precision=Precision.fp32), 10),
    Check("grouped_mm_bf16", partial(grouped_products, precision=Precision.bf16), 10),
    Check("transformer_engine", parity_transformer_engine, 20),
    Check("speed_dense", partial(speed, variant="dense"), 40),
    Check("speed_m5_t5", partial(speed, variant="m5_t5"), 50),
    Check("speed_m2_t2", partial(speed, variant="m2_t2"), 40),
    Check("timeline", timeline, 25),
    Check("synchronisations", synchronisations, 10),
    *(Check(f"fp8_{recipe.value}", partial(_fp8, recipe=recipe), 40) for recipe in CAPABILITIES),
    Check("deepspeed", parity_deepspeed, 40),
    Check("speed_dense_compiled", partial(speed, variant="dense_compiled"), 90),
    Check("diffusers_compiled", against_diffusers, 120),
]


class OutOfTime(BaseException):
    """The time for all checks is over; no library takes it for an error of its own."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the context when ``seconds`` have passed."""

    def end(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_checks(checks: Sequence[Check], workplace: Workplace, minutes: float) -> list[Result]:
    """Run the checks one after the other; none stops the others, and none goes on when the time is over."""
    started = time.monotonic()
    results = []
    for number, check in enumerate(checks, 1):
        left = 60 * minutes - (time.monotonic() - started)
        print(
            f"[{60 * minutes - left:5.0f} s] {number}/{len(checks)} {check.name}", file=sys.stderr, flush=True
        )
        if left < (min(1, check.seconds) if workplace.small else check.seconds):
            why = f"it may take {check.seconds:.0f} s and {max(left, 0):.0f} of {minutes:g} minutes are left: raise --minutes, or name it with --only"
            result = Result(check.name, "skipped", 0.0, why)
        else:
            result = run_check(check, workplace, left)
        print(
            f"          {result.status} after {result.seconds:.1f} s {result.reason or ''}".rstrip(),
            file=sys.stderr,
        )
        results.append(result)
    return results


def run_check(check: Check, workplace: Workplace, left: float) -> Result:
    """Run a check within the seconds that are left."""
    started = time.monotonic()

    def result(status: str, why: str | None = None, trace: str | None = None) -> Result:
        return Result(check.name, status, time.monotonic() - started, why, trace)

    try:
        with at_most(left):
            figures = check.run(workplace)
    except Skipped as skipped:
        return result("skipped", str(skipped))
    except OutOfTime:
        found = result("skipped", f"stopped after {left:.0f} s, when the time for all checks was over")
    except Exception as error:
        found = result("failed", reason(error), traceback.format_exc())
    else:
        found = result("ok")
        found.figures = figures
        return found
    workplace.release()  # the trainer may be in the middle of a step
    return found


def positive(text: str) -> float:
    """Return a number above zero."""
    value = float(text)
    if not value > 0:
        raise ValueError(text)
    return value


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=[each.value for each in Device], default=Device.auto.value)
    parser.add_argument("--small", action="store_true", help="tiny models in the place of SD3-medium")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check"), metavar="FOLDER")
    parser.add_argument("--minutes", type=positive, default=8.0, help="for all checks together")
    parser.add_argument(
        "--only", nargs="+", choices=[each.name for each in CHECKS], metavar="NAME",
        help=f"of {', '.join(each.name for each in CHECKS)}",
    )  # fmt: skip
    ledger.add_arguments(parser)
    return parser.parse_args(arguments)


def check_device(name: str, small: bool) -> Device:
    """Return the device to run on.

    Raises:
        UserError: there is no GPU, or it is SD3-medium that a CPU would run.
    """
    device = Device(name)
    if device is Device.auto:
        device = Device.cuda if torch.cuda.is_available() else Device.cpu
    if device is Device.cpu and not small:
        raise UserError(
            "SD3-medium on a CPU would take hours; run this where PyTorch finds a GPU, or add --device cpu --small for tiny models."
        )
    return device


def run(arguments: argparse.Namespace) -> int:
    """Run the checks, print and write what they found; returns the exit code."""
    device = check_device(arguments.device, arguments.small)
    atomic.check_writable(arguments.output, "--output")
    arguments.output.mkdir(parents=True, exist_ok=True)
    checks = [each for each in CHECKS if not arguments.only or each.name in arguments.only]
    config = run_config(parity_model(arguments.small), Precision.fp32, torch.device(device.value), 1)
    with process_groups(config) as place:
        workplace = Workplace(place, arguments.small, arguments.output)
        report = Report(environment(place), arguments.small, run_checks(checks, workplace, arguments.minutes))
        workplace.release()
    atomic.write(arguments.output / "gpu_check.json", report.json())
    atomic.write(arguments.output / "gpu_check.md", report.markdown())
    figures = dict(zip(FIGURES, report.row(), strict=True))
    ledger.write(
        arguments, figures, ("rmoe_megatron/engine", "rmoe_megatron/model", "tools/gpu_check_speed.py"), place
    )
    print(report.markdown())
    print(f"{arguments.output}/gpu_check.json and gpu_check.md are written.", file=sys.stderr)
    return int(any(each.status == "failed" for each in report.results))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parsed = parse(arguments)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # PyTorch warns of a missing GPU
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return run(parsed)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main())
