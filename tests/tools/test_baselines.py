"""Baselines: a ratio fails if it is worse by more than a third in every try."""

import sys
from typing import Any

import baselines
import ledger
import pytest
from ledger import Record


def record(**figures: float) -> Record:
    return Record(
        command="tools/benchmark_step.py",
        commit="0123abc",
        date="2026-11-29",
        machine={"kind": "cpu-avx2", "processor": "a CPU", "cores": 2, "threads": 2},
        versions={"torch": "2.15.0"},
        figures=figures,  # type: ignore[typeddict-item]
        code={},
        note="",
    )


def run(
    monkeypatch: pytest.MonkeyPatch, known: dict[str, Record], measured: list[dict[str, float]]
) -> tuple[int, int]:
    """Run the command on a machine that measures ``measured`` one after the other; returns exit code and tries."""
    check = baselines.Check("step", "tools/benchmark_step.py", ("dense", "over_flops"))
    left = iter(measured)
    tries: list[Any] = []
    monkeypatch.setattr(baselines, "checks", lambda: iter([check]))
    monkeypatch.setattr(baselines, "measure", lambda *_: (tries.append(1), record(**next(left)))[1])
    monkeypatch.setattr(ledger, "load", lambda: known)
    monkeypatch.setattr(ledger, "machine", lambda _: record()["machine"])
    monkeypatch.setattr(sys, "argv", ["baselines.py"])
    with pytest.raises(SystemExit) as ended:
        baselines.main()
    return int(str(ended.value.code)), len(tries)


BASELINE = {"cpu-avx2/step": record(dense=0.6, over_flops=1.2)}


def test_within_a_third_passes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, BASELINE, [{"dense": 0.79, "over_flops": 1.59}]) == (0, 1)


def test_a_lost_half_fails_after_three_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.98 where 0.6 is known, as attention once did it."""
    assert run(monkeypatch, BASELINE, [{"dense": 0.98, "over_flops": 1.2}] * 3) == (1, 3)


def test_a_noisy_try_is_forgiven(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = [{"dense": 0.9, "over_flops": 1.2}, {"dense": 0.7, "over_flops": 1.7}]
    assert run(monkeypatch, BASELINE, tries) == (0, 2)


def test_another_kind_of_machine_is_reported_not_judged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"cpu-avx512/step": record(dense=0.1, over_flops=0.1)}
    assert run(monkeypatch, known, [{"dense": 9.0, "over_flops": 9.0}]) == (0, 1)
    assert "dense 9.000 (no baseline for this kind of machine)" in capsys.readouterr().out


def test_a_slower_ratio_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, BASELINE, [{"dense": 0.5, "over_flops": 2.4}] * 3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cpu-avx2/step dense 0.500 (baseline 0.6, at most 0.800)"
    assert lines[1] == "cpu-avx2/step over_flops 2.400 (baseline 1.2, at most 1.600: TOO SLOW in 3 tries)"


def test_a_missing_ratio_of_a_baseline_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, {"cpu-avx2/step": record(dense=0.6)}, [{"dense": 0.6, "over_flops": 9.0}]) == (
        0,
        1,
    )
