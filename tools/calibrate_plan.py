"""Finds what share of its data sheet a GPU reaches, for `rmoe plan --hardware`, and says how far plans are from what was measured.

    python tools/calibrate_plan.py runs/gpu_check/gpu_check.json --gpu h200 --write h200.json
    python tools/calibrate_plan.py --gpu h200        # the run that the ledger keeps

The steps are those that tools/gpu_check.py measures of SD3-medium in bf16, dense and recurrent. Shares are fitted to every second of
them; the others are only predicted. Each is planned in 10 to 30 s of CPU time.
"""

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import ledger
import torch
from gpu_check_workplace import PIXELS_PER_LATENT, recurrence_of, run_config, speed_model, with_size

from rmoe_megatron.config.run import Precision, RunConfig
from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic
from rmoe_megatron.planning.calibration import MeasuredStep, calibrated
from rmoe_megatron.planning.dry_run import RankUsage, dry_run
from rmoe_megatron.planning.hardware import HARDWARE, Hardware
from rmoe_megatron.planning.step_time import stage_time

# Modules and latent steps of what gpu_check calls so.
VARIANTS = {"speed_dense": None, "speed_m5_t5": (5, 5), "speed_m2_t2": (2, 2)}
# The ledger's run: its names, and how many pictures had fitted, which the page says and the record does not.
RECORDED = [
    ("dense_512", "speed_dense", 512, 32), ("dense_1024", "speed_dense", 1024, 8), ("m5_512", "speed_m5_t5", 512, 32),
    ("m5_1024", "speed_m5_t5", 1024, 8), ("m2_512", "speed_m2_t2", 512, 16), ("m2_1024", "speed_m2_t2", 1024, 8),
]  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A measured step: of which check, at how many pixels of a side, of how many pictures; seconds, and bytes of all tensors."""

    check: str
    pixels: int
    batch: int
    seconds: float
    peak: float


def rows_of(path: Path) -> Iterator[Row]:
    """Yield the steps of a JSON of tools/gpu_check.py.

    Raises:
        UserError: it has none.
    """
    found = 0
    for result in json.loads(path.read_text())["results"]:
        if result["name"] in VARIANTS and result["status"] == "ok":
            for size in result["figures"]["sizes"]:
                found += 1
                yield Row(
                    result["name"], size["pixels"], size["batch"], size["seconds"], size["peak_gb"] * 1e9
                )
    if found == 0:
        raise UserError(
            f"{path} has no measured steps; run python tools/gpu_check.py --only {' '.join(VARIANTS)}"
        )


def recorded_rows() -> Iterator[Row]:
    """Yield the steps of the run on an H200 that the ledger keeps."""
    figures = ledger.load()["nvidia-h200/gpu_check"]["figures"]
    for name, check, pixels, batch in RECORDED:
        rate, peak = map(float, re.findall(r"([\d.]+) (?:samples/s|GB)", str(figures[name])))
        yield Row(check, pixels, batch, batch / rate, peak * 1e9)


def config_of(row: Row) -> RunConfig:
    """Return the run whose step was measured."""
    settings = VARIANTS[row.check]
    config = run_config(speed_model(small=False), Precision.bf16, torch.device("cpu"), row.batch)
    recurrence = settings and recurrence_of(*settings, small=False)
    return with_size(replace(config, recurrence=recurrence), row.pixels // PIXELS_PER_LATENT, row.batch)


def seconds_of(usage: RankUsage, hardware: Hardware) -> float:
    """Return the time of a step as a plan has it."""
    return stage_time(usage, hardware, 8, overlaps_reduce=False, overlaps_gather=False).total


def main() -> None:
    """Plan every step, fit, and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", type=Path, nargs="?", help="of tools/gpu_check.py; without it the ledger's")
    parser.add_argument("--gpu", choices=list(HARDWARE), default="h200")
    parser.add_argument("--write", type=Path, help="a file for rmoe plan --hardware")
    ledger.add_arguments(parser)
    arguments = parser.parse_args()
    rows = list(rows_of(arguments.json) if arguments.json else recorded_rows())
    usages = [dry_run(config_of(row), 0, 1) for row in rows]
    table = HARDWARE[arguments.gpu]
    fitted = [MeasuredStep(usage.operations, row.seconds) for usage, row in zip(usages, rows, strict=True)][
        ::2
    ]
    found = calibrated(table, fitted)
    shares = {name: round(getattr(found, name), 3) for name in ("product", "attention", "element_wise")}
    print(f"shares of the data sheet that are reached: {shares}")
    off: dict[str, list[float]] = {"fitted": [], "predicted": [], "memory": []}
    for number, (row, usage) in enumerate(zip(rows, usages, strict=True)):
        kind = "predicted" if number % 2 else "fitted"
        time, memory = (
            seconds_of(usage, found) / row.seconds - 1,
            (usage.peak - usage.averages) / row.peak - 1,
        )
        off[kind].append(abs(time))
        off["memory"].append(abs(memory))
        print(
            f"{row.check:12} {row.pixels:5} pixels, {row.batch:3} pictures: planned {(usage.peak - usage.averages) / 1e9:6.1f} GB, measured "
            f"{row.peak / 1e9:6.1f} ({memory:+.1%}); {kind} {seconds_of(usage, found) * 1e3:7.1f} ms, measured {row.seconds * 1e3:7.1f} "
            f"({time:+.1%}), by the table alone {seconds_of(usage, table) * 1e3:7.1f}"
        )
    if arguments.write is not None:
        atomic.write(arguments.write, json.dumps(shares, indent=1) + "\n")
    figures = {f"{name}_off_by": max(each) for name, each in off.items()} | shares
    paths = ("rmoe_megatron/planning", "rmoe_megatron/model", "rmoe_megatron/engine")
    ledger.write(arguments, figures, paths, torch.device("cpu"))


if __name__ == "__main__":
    main()
