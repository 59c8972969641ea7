"""A run that is asked to stop saves where it is, and goes on as if it had not been interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rmoe_megatron.checkpoint.folders import PENDING, list_checkpoints, pending_of, read_state
from rmoe_megatron.config.loading import load_config
from rmoe_megatron.distributed import stop_signals
from rmoe_megatron.errors import Interrupted
from rmoe_megatron.inspection.run import show_run
from rmoe_megatron.training import run
from rmoe_megatron.training.history import read_history
from rmoe_megatron.training.interruption import Interruption, StopRequest
from rmoe_megatron.training.logging import RunLogger
from rmoe_megatron.training.loop import TrainingLoop
from tests.support.commands import Command, finish, kill, start
from tests.support.configurations import one_rank, tiny_config
from tests.support.runs import losses, make_run

SETTINGS = [
    "training.steps=3", "training.validate_every=3", "training.sample_every=3", "training.sample_steps=2",
    "checkpoint.every=2", "checkpoint.keep_last=9",
]  # fmt: skip
# Before each of the three steps, before each of the nine losses (one timestep that is drawn, eight that are fixed) of the two batches
# of the validation, between the two timesteps of the samples.
PLACES = 3 + 2 * (1 + 8) + 2
TIMED = {"samples_per_second", "tokens_per_second", "model_tflops", "data_wait_seconds", "restarts"}


def records(run_dir: Path) -> list[dict[str, float]]:
    """The records of a run without what depends on the machine, and on how often it was started."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


def outcome(run_dir: Path) -> tuple[Any, ...]:
    """Records, tensors of the last checkpoint (weights, averages, optimizer) and pictures of a run, to the bit."""
    reader = FileSystemReader(run_dir / "checkpoints" / "step-00000003")
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    distributed_checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    states = {name: each.numpy().tobytes() for name, each in tensors.items()}
    return records(run_dir), states, [file.read_bytes() for file in sorted((run_dir / "samples").iterdir())]


class StopsAt:
    """Asks to stop at one of the places where a run can."""

    def __init__(self, place: int) -> None:
        self.place, self.passed = place, 0

    def check(self, interruption: Interruption) -> None:
        self.passed += 1
        if self.passed == self.place:
            raise StopRequest("the test")


def test_a_run_can_stop_at_every_place_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_path = make_run(tmp_path)
    monkeypatch.setattr(RunLogger, "draw_curves", lambda log: None)

    def train(place: int) -> tuple[Path, int]:
        run_dir = tmp_path / f"stopped_at_{place}"
        stops = StopsAt(place)
        monkeypatch.setattr(Interruption, "check", lambda interruption: stops.check(interruption))
        run.train(load_config(config_path, [*SETTINGS, f"run_dir={run_dir}"]))
        return run_dir, stops.passed

    # Another model of this process has left its loss with Megatron-Core.
    get_moe_metrics_tracker().record("load_balancing_loss", torch.tensor(5.0), layer_number=1, num_layers=3)
    whole, passed = train(place=0)
    assert passed == PLACES
    expected = outcome(whole)
    assert {name.partition(".")[0] for name in expected[1]} >= {"ema", "optimizer", "rng"}
    steps = {}
    for place in (1, 2, 3, 13, 23):
        with pytest.raises(Interrupted, match="the test"):
            train(place)
        run_dir = tmp_path / f"stopped_at_{place}"
        steps[place] = [
            (each.step, read_state(each.path).get("pending")) for each in list_checkpoints(run_dir)
        ]
        monkeypatch.setattr(Interruption, "check", lambda interruption: None)
        run.resume(run_dir, [])
        assert outcome(run_dir) == expected, f"stopped at {place}"
        assert not any(pending_of(each) for each in list_checkpoints(run_dir))
        assert [event["event"] for event in read_history(run_dir)] == [
            "started", "interrupted", "started" if place == 1 else "resumed", "finished",
        ]  # fmt: skip
    assert steps == {
        1: [],  # nothing was trained, nothing is saved
        2: [(1, [])],
        3: [(2, [])],
        13: [(3, ["validation", "samples"]), (2, [])],
        23: [(3, ["samples"]), (2, [])],
    }


def until(condition: Callable[[], bool], process: Command | subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, finish(process)
        time.sleep(0.02)


def has_logged(run_dir: Path, step: int) -> Callable[[], bool]:
    return lambda: (run_dir / "metrics.jsonl").is_file() and max(losses(run_dir), default=0) >= step


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])  # as SLURM sends it, as Ctrl-C in a terminal does
def test_a_signal_to_every_process_of_a_job(tmp_path: Path, name: str) -> None:
    run_dir, settings = (
        tmp_path / "run",
        ["training.steps=100000", "checkpoint.every=100000", "data.num_workers=2"],
    )
    process = start(["train", str(make_run(tmp_path)), *settings])
    until(has_logged(run_dir, 3), process)
    os.killpg(process.pid, signal.Signals[name])  # its data loading processes too
    code, errors = finish(process, timeout=60)
    assert code == 75, errors
    step = list_checkpoints(run_dir)[0].step
    last = errors.splitlines()[-1]
    assert last == (
        f"interrupted: {name}: {run_dir} stopped after step {step}; `rmoe train --resume {run_dir}` goes on."
    )
    assert max(losses(run_dir)) == step
    (_, interrupted) = read_history(run_dir)
    assert (interrupted["event"], interrupted["step"], interrupted["why"]) == ("interrupted", step, name)


def test_a_signal_to_one_rank_stops_all_at_one_step(tmp_path: Path) -> None:
    run_dir, config = tmp_path / "run", make_run(tmp_path)
    process = start(["train", str(config), "training.steps=100000", "checkpoint.every=100000"], ranks=2)
    until(has_logged(run_dir, 3), process)
    ranks = sorted(psutil.Process(process.pid).children(), key=lambda rank: (rank.create_time(), rank.pid))
    ranks[1].send_signal(signal.SIGUSR1)
    code, errors = finish(process, timeout=90)
    assert code == 75, errors
    assert "interrupted: SIGUSR1" in errors
    step = list_checkpoints(run_dir)[0].step
    assert max(losses(run_dir)) == step
    assert {event["ranks"] for event in read_history(run_dir)} == {2}


def test_a_run_stops_before_its_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000")
    now = 0.0
    interruption = Interruption(clock=lambda: now)
    interruption.save_seconds = 100.0
    with one_rank(tiny_config()):
        now = 799.0
        interruption.check()
        now = 801.0  # less than two saves
        with pytest.raises(StopRequest, match="time limit"):
            interruption.check()
        monkeypatch.setattr(stop_signals, "received", [("SIGUSR1", 0.0)])
        with pytest.raises(StopRequest, match="SIGUSR1"):
            interruption.check()


def test_the_clock_of_one_rank_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node whose clock is hours ahead sees the end of a job at its beginning."""
    others = {
        "WORLD_SIZE": "2",
        "RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "SLURM_JOB_END_TIME": "1000",
    }
    for name, value in others.items():
        monkeypatch.setenv(name, value)
    late = Interruption(clock=lambda: 5000.0)
    for name in others:
        monkeypatch.delenv(name)
    with one_rank(tiny_config()):
        late.check()
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000")
    first = Interruption(clock=lambda: 5000.0)
    with one_rank(tiny_config()), pytest.raises(StopRequest, match="time limit"):
        first.check()


LISTENING = """
import signal, time
from rmoe_megatron.distributed import stop_signals
signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run in the background
stop_signals.PATIENCE = 0.5
stop_signals.listen()
print("ready", flush=True)
for _ in range(600):
    time.sleep(0.1)
"""


def start_listening() -> subprocess.Popen[str]:
    """Start a process that notes signals and never gets to where it would stop."""
    command = [sys.executable, "-c", LISTENING]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def test_a_second_ctrl_c_ends_a_process_at_once() -> None:
    process = start_listening()
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "\n"
        assert "a second Ctrl-C ends it at once" in process.stderr.readline()
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
    finally:
        if process.poll() is None:
            kill(process)


def test_a_process_that_cannot_stop_ends_at_a_later_sigterm() -> None:
    process = start_listening()
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)  # SLURM and a batch script both send one
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == -signal.SIGTERM
    finally:
        if process.poll() is None:
            kill(process)


def test_what_a_new_configuration_no_longer_has_is_left_out_at_a_resume(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, settings = (
        make_run(tmp_path),
        [*SETTINGS, "training.steps=2", "training.sample_every=2", "optimizer.warmup_steps=0"],
    )
    run_dir = tmp_path / "run"
    run.train(load_config(config, [*settings, "training.validate_every=100"]))
    state = list_checkpoints(run_dir)[0].path / "run_state.json"
    assert json.loads(state.read_text())["pending"] == ["samples"]
    (run_dir / "checkpoints" / PENDING).unlink()  # as if the run had been killed before it drew them
    run.resume(run_dir, ["training.steps=3", "training.sample_prompts=[]"])
    assert list_checkpoints(run_dir)[0].step == 3
    assert "samples should follow, which the configuration no longer has" in capfd.readouterr().err


def test_a_failure_is_recorded_with_the_step_that_the_run_was_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = TrainingLoop.step

    def failing(loop: TrainingLoop, micro_batches: list[Any]) -> Any:
        if loop.state.progress.step == 2:
            raise OSError(5, "Input/output error")
        return step(loop, micro_batches)

    monkeypatch.setattr(TrainingLoop, "step", failing)
    with pytest.raises(OSError, match="Input/output"):
        run.train(load_config(make_run(tmp_path), SETTINGS))
    (started, failed) = read_history(tmp_path / "run")
    assert (started["event"], failed["event"], failed["step"]) == ("started", "failed", 2)


def test_what_was_drawn_is_not_drawn_again_and_a_finished_run_says_how_to_train_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir, config = (
        tmp_path / "run",
        load_config(make_run(tmp_path), [*SETTINGS, "optimizer.warmup_steps=1"]),
    )
    sample = TrainingLoop.sample

    def killed(loop: TrainingLoop) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(TrainingLoop, "sample", killed)
    with pytest.raises(OSError, match="Input/output"):
        run.train(config)
    assert list(show_run(run_dir))[1].endswith("verified, samples still to come")
    drawn: list[int] = []

    def counted(loop: TrainingLoop) -> None:
        sample(loop)
        drawn.append(loop.state.progress.step)

    monkeypatch.setattr(TrainingLoop, "sample", counted)
    capfd.readouterr()
    for _ in range(2):
        run.resume(run_dir, [])
    assert drawn == [3]
    assert list(show_run(run_dir))[1].endswith("verified")
    assert capfd.readouterr().out == (
        f"{run_dir} is finished: all of its 3 steps are done; `rmoe train --resume {run_dir} training.steps=6` trains on.\n"
    )
    run.resume(run_dir, ["training.steps=6"])
    assert drawn == [3, 6]
    assert [checkpoint.step for checkpoint in list_checkpoints(run_dir)] == [6, 4, 3, 2]


def test_an_evaluation_may_be_what_is_still_to_come(tmp_path: Path) -> None:
    (tmp_path / "run_state.json").write_text(
        json.dumps({"step": 3, "samples": 24, "pending": ["samples", "evaluation shapes"]})
    )
    assert read_state(tmp_path)["pending"] == ["samples", "evaluation shapes"]


def test_the_first_step_is_a_line_and_the_file_has_every_so_many(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = [
        "training.steps=5",
        "training.log_every=2",
        "optimizer.warmup_steps=1",
        "data.validation=null",
    ]
    run.train(load_config(make_run(tmp_path), [*settings, "training.sample_prompts=[]"]))
    lines = [line.split()[:3] for line in capfd.readouterr().err.splitlines() if line.startswith("step ")]
    assert lines == [["step", f"{step}/5", "loss"] for step in (1, 2, 4, 5)]
    assert list(losses(tmp_path / "run")) == [2, 4, 5]
