"""Measures the short ratios again and holds them to the ledger's records of this kind of machine: a baseline.

    python tools/baselines.py [--tries 3]

Exit code 1 if a ratio is worse than its baseline by more than a third in every try: wide enough for a noisy machine, narrow enough
for a lost half. What this kind of machine has no baseline for is measured and reported, not judged. A baseline is moved by
recording it anew (``tools/benchmark_step.py ... --record NAME``), with the reason in the commit.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ledger
import torch
from ledger import Figure, Record

from rmoe_megatron.distributed.processor import bf16_is_fast

MARGIN = 4 / 3  # of a measurement over its baseline


@dataclass(frozen=True)
class Check:
    """A short benchmark whose ratios are judged; smaller is better in all of them."""

    name: str  # of its record
    command: str  # if there is no record, which has its own
    ratios: tuple[str, ...]


def checks() -> Iterator[Check]:
    """Yield what is checked on this processor, in the precision that ``precision=auto`` takes here."""
    precision = "bf16" if bf16_is_fast() else "fp32"
    # Not dense_over_products: the same code gave 1.73 and 2.88 on two machines of one kind.
    ratios = ("dense_over_diffusers", "over_flops")
    for config in ("shapes_tiny", "shapes_small"):
        command = f"tools/benchmark_step.py configs/{config}.yaml --repeats 8 precision={precision}"
        # diffusers' own step in bf16 is up to 1.6 times as fast in some processes as in others (tools/benchmark_results.md). Of the
        # smaller model the slowest known ratio is the baseline, of the larger one not enough is known.
        is_steady = precision == "fp32" or config == "shapes_tiny"
        yield Check(f"step-{config}-{precision}", command, ratios if is_steady else ratios[1:])


def measure(check: Check, command: str) -> Record:
    """Run the benchmark in a process of its own and return what it records.

    Raises:
        CalledProcessError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        script, *arguments = shlex.split(command)
        subprocess.run(
            [sys.executable, str(ledger.ROOT / script), *arguments, "--record", check.name, "--records", folder],
            cwd=ledger.ROOT, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        (record,) = ledger.load(Path(folder)).values()
    return record


def best(tries: list[Mapping[str, Figure]], ratio: str) -> float:
    """Return the smallest value of a ratio in all tries."""
    return min(float(figures[ratio]) for figures in tries)


def too_slow(
    ratios: tuple[str, ...], tries: list[Mapping[str, Figure]], baseline: Mapping[str, Figure]
) -> list[str]:
    """Return the ratios whose smallest value in all tries exceeds the baseline by more than a third."""
    return [
        ratio
        for ratio in ratios
        if ratio in baseline and best(tries, ratio) > MARGIN * float(baseline[ratio])
    ]


def main() -> None:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tries", type=int, default=3)
    most = max(1, parser.parse_args().tries)
    kind, records, failed = ledger.machine(torch.device("cpu"))["kind"], ledger.load(), False
    for check in checks():
        known = records.get(f"{kind}/{check.name}")
        baseline = known["figures"] if known else {}
        tries: list[Mapping[str, Figure]] = []
        while not tries or (len(tries) < most and too_slow(check.ratios, tries, baseline)):
            tries.append(measure(check, known["command"] if known else check.command)["figures"])
        slow = too_slow(check.ratios, tries, baseline)
        for ratio in check.ratios:
            verdict = "no baseline for this kind of machine"
            if ratio in baseline:
                verdict = f"baseline {baseline[ratio]}, at most {MARGIN * float(baseline[ratio]):.3f}"
                verdict += f": TOO SLOW in {len(tries)} tries" if ratio in slow else ""
            print(f"{kind}/{check.name} {ratio} {best(tries, ratio):.3f} ({verdict})", flush=True)
        failed = failed or bool(slow)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
