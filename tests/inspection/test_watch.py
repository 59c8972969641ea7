"""The screen about runs: what it shows of folders whose contents are written by hand."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rmoe_megatron.inspection.report import Run
from rmoe_megatron.inspection.watch import lines_of_run, remaining_seconds, sparkline
from tests.inspection.test_report import written
from tests.support.commands import rmoe


def test_bars_of_values() -> None:
    assert sparkline([]) == ""
    assert sparkline([3.0, 3.0]) == "▁▁"
    # Each is ten times the one before, and as far above it on a scale of logarithms.
    assert sparkline([1, 10, 100, 1000, 10**4, 10**5, 10**6, 10**7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 7, 0, 7, 14, 14], width=3) == "▁▁█"  # means 3.5, 3.5 and 14
    assert sparkline([-1, 0, 6]) == "▁▂█"


def test_what_is_shown(tmp_path: Path) -> None:
    run = Run.read(written(tmp_path, "run", "1.0e-3", [0.8, 0.4, 0.2]))
    # Ten steps of eight samples are left, at 40 samples a second.
    assert remaining_seconds(run) == pytest.approx(2.0)
    now = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime + 75
    shown = dict(lines_of_run(run, now))
    assert shown["last record"] == "01:15 ago"
    assert shown["time left"] == "00:02"
    assert (
        shown["loss"] == "0.2  █▅▁"
    )  # halved twice: the middle is the middle of seven steps, rounded to the even one
    assert shown["speed"] == "40 samples/s, 25.0% of it waiting for data"
    assert shown["gates"] == "entropy 0.50"
    assert shown["restarts"] == "1"
    assert shown["shapes_seen"] == "0.75  ▁█"
    assert "checkpoint" not in shown


def test_the_command_ends_when_asked_and_touches_nothing(tmp_path: Path) -> None:
    runs = [written(tmp_path, name, "1.0e-3", [0.9, 0.5]) for name in ("one", "two", "three")]
    before = {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*")}
    code, errors = rmoe("watch", *map(str, runs), "--once")
    assert code == 0, errors
    environment = {**os.environ, "COLUMNS": "100"}
    command = [sys.executable, "-m", "rmoe_megatron", "watch", str(runs[0]), "--interval", "0.2"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()  # it shows something before it is asked
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert str(runs[0]) in line
    assert (process.returncode, errors) == (0, "")
    assert {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*")} == before


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    code, errors = rmoe("watch", str(tmp_path), "--once")
    assert (code, errors.count("error: ")) == (2, 1)
    assert "There is no run at" in errors
