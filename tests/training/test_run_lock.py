"""A later start of a SLURM job takes the run from an earlier one; nobody else does."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rmoe_megatron.checkpoint.folders import list_checkpoints, remove_old
from rmoe_megatron.config.run import LoggingConfig
from rmoe_megatron.errors import RunError, UserError
from rmoe_megatron.training import run_lock
from rmoe_megatron.training.history import count_restarts, read_history, record
from rmoe_megatron.training.logging import RunLogger
from rmoe_megatron.training.run_lock import Fence, exclusive
from tests.support.commands import kill

HOLD = """\
import sys, time
from pathlib import Path
from rmoe_megatron.training.run_lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(600)
"""


def hold(run_dir: Path) -> subprocess.Popen[str]:
    """Start a process that holds the run, in the job of this process's environment."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    return process


@pytest.mark.parametrize(
    ("mine", "other"),
    [
        ({}, {}),
        ({}, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}),
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}),
        (
            {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"},
            {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"},
        ),
    ],
)
def test_another_job_and_an_earlier_start_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mine: dict[str, str], other: dict[str, str]
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in mine.items():
        monkeypatch.setenv(name, value)
    process = hold(tmp_path)
    for name, value in other.items():
        monkeypatch.setenv(name, value)
    try:
        with pytest.raises(UserError, match=f"in use by process {process.pid} on "), exclusive(tmp_path):
            pass
        assert process.poll() is None
    finally:
        kill(process)


def test_a_later_start_takes_over_and_the_earlier_one_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    process = hold(tmp_path)
    earlier = Fence(tmp_path)
    earlier.check()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with exclusive(tmp_path) as fence:
        fence.check()
        assert process.wait(timeout=10) == 1
        assert process.stderr is not None
        assert "SLURM has started job 7 again (restart 1), which has taken over" in process.stderr.read()
        with pytest.raises(RunError, match="taken over"):
            earlier.check()  # what a checkpoint asks before it is published
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    with exclusive(tmp_path) as fence:  # another job, later: no obstacle
        fence.check()


def test_an_earlier_start_that_does_not_end_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(run_lock, "PATIENCE", 1.5)
    process = subprocess.Popen(
        [sys.executable, "-c", "import rmoe_megatron.training.run_lock as r; r.INTERVAL = 1e6\n" + HOLD, str(tmp_path)],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        with pytest.raises(RunError, match=f"still held by process {process.pid} on "), exclusive(tmp_path):
            pass
    finally:
        kill(process)


@pytest.mark.parametrize("name", ["ENOSYS", "EOPNOTSUPP", "ENOLCK"])
def test_a_file_system_without_locks_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    error = OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    def lockf(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with exclusive(tmp_path) as fence:
        fence.check()
    assert f"has no locks ({error.strerror})" in caplog.text
    error = OSError(errno.EIO, "Input/output error")
    with (
        pytest.raises(UserError, match=r"run\.lock cannot be locked \(Input/output error\)"),
        exclusive(tmp_path),
    ):
        pass


def test_history_survives_a_torn_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    record(tmp_path, "started", 0)
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"event": "fin')
    assert [event["event"] for event in read_history(tmp_path)] == ["started"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    record(tmp_path, "resumed", 5)
    record(tmp_path, "interrupted", 8, "SIGTERM")
    events = read_history(tmp_path)
    assert [(event["event"], event["step"]) for event in events] == [
        ("started", 0),
        ("resumed", 5),
        ("interrupted", 8),
    ]
    assert (events[1]["job"], events[1]["restart"], events[2]["why"]) == ("7", 1, "SIGTERM")
    assert count_restarts(events) == 1
    (tmp_path / "history.jsonl").write_text('{"event": "exploded"}\n')
    with pytest.raises(UserError, match="Line 1 of"):
        read_history(tmp_path)


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder", "device"])
def test_strange_files_of_a_run_are_refused_and_change_nothing_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("precious")

    def plant(path: Path) -> None:
        targets = {
            "link": tmp_path / "precious",
            "dangling": tmp_path / "nowhere",
            "device": Path("/dev/zero"),
        }
        if kind in targets:
            path.symlink_to(targets[kind])
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()

    def hold() -> None:
        with exclusive(tmp_path / "run"):
            pass

    uses = {
        "run.lock": hold,
        "history.jsonl": lambda: record(tmp_path / "run", "started", 0),
        "run.takeover": lambda: Fence(tmp_path / "run").check(),
        "metrics.jsonl": lambda: RunLogger(tmp_path / "run", LoggingConfig(tensorboard=False), 10, 0, True),
    }
    for name, use in uses.items():
        plant(tmp_path / "run" / name)
        with pytest.raises(UserError, match=name):
            use()
    with pytest.raises(UserError, match="history"):
        read_history(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", ["checkpoints", "samples", "tensorboard", "wandb"])
def test_a_folder_of_a_run_is_no_link_out_of_it(tmp_path: Path, name: str) -> None:
    """Old checkpoints are removed, which must not happen to those of another run."""
    (tmp_path / "run").mkdir()
    (tmp_path / "other" / "step-00000001").mkdir(parents=True)
    (tmp_path / "run" / name).symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match=f"{name} is a link out of its folder"), exclusive(tmp_path / "run"):
        pass
    if name == "checkpoints":
        with pytest.raises(UserError, match="link out of its folder"):
            remove_old(tmp_path / "run", keep_last=1, step=9)
        (tmp_path / "run" / name).unlink()
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "step-00000001").symlink_to(tmp_path / "other" / "step-00000001")
        with pytest.raises(UserError, match="link out of its folder"):
            list_checkpoints(tmp_path / "run")


def test_a_huge_history_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "history.jsonl").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="too many for the history of a run"):
        record(tmp_path, "started", 0)
    with pytest.raises(UserError, match="nearly all of them are a hole"):
        read_history(tmp_path)
