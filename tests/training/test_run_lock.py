"""A later start of a SLURM job takes the run from an earlier one; nobody else does."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist

from rmoe_megatron.checkpoint.folders import CheckpointFolder, list_checkpoints, remove_old
from rmoe_megatron.config.loading import load_config
from rmoe_megatron.config.run import CheckpointConfig, LoggingConfig, RunConfig
from rmoe_megatron.distributed.process_groups import process_groups
from rmoe_megatron.errors import RunError, UserError
from rmoe_megatron.training import run, run_lock
from rmoe_megatron.training.history import count_restarts, read_history, record
from rmoe_megatron.training.logging import RunLogger
from rmoe_megatron.training.run_lock import Fence, exclusive
from tests.support.commands import kill, rmoe
from tests.support.ranks import MMDIT, configuration, run_on_ranks
from tests.support.runs import make_run

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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration and a run of two steps."""
    folder = tmp_path_factory.mktemp("whole")
    settings = [
        "training.steps=2",
        "checkpoint.every=1",
        "checkpoint.keep_last=9",
        "training.sample_prompts=[]",
    ]
    code, errors = rmoe(
        "train", str(make_run(folder)), *settings, "data.validation=null", "optimizer.warmup_steps=0"
    )
    assert code == 0, errors
    return folder


def saved_meanwhile(monkeypatch: pytest.MonkeyPatch, source: Path, run_dir: Path) -> None:
    """Let another process have saved a checkpoint and be gone by the time this one has the folder."""

    @contextmanager
    def held_before(asked: Path) -> Iterator[Fence]:
        shutil.copytree(source, run_dir / "checkpoints" / source.name)
        with exclusive(asked) as fence:
            yield fence

    monkeypatch.setattr(run, "exclusive", held_before)


def test_a_new_run_does_not_begin_where_another_one_has_saved_meanwhile(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_meanwhile(monkeypatch, whole / "run" / "checkpoints" / "step-00000002", tmp_path / "run")
    config = load_config(whole / "config.yaml", [f"run_dir={tmp_path}/run"])
    with pytest.raises(UserError, match="already holds checkpoints"):
        run.train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "history.jsonl").exists()


def test_a_run_goes_on_from_what_was_saved_meanwhile(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000002")
    saved_meanwhile(monkeypatch, whole / "run" / "checkpoints" / "step-00000002", tmp_path / "run")
    run.resume(tmp_path / "run", ["training.steps=3"])
    last = read_history(tmp_path / "run")[-2:]
    assert [(event["event"], event["step"]) for event in last] == [("resumed", 2), ("finished", 3)]


def test_what_a_lost_node_left_of_a_save_holds_nobody_up(whole: Path, tmp_path: Path) -> None:
    """The claim of its process looks alive for ten minutes: nobody here can tell that it is gone."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole / "run", run_dir)
    (run_dir / "checkpoints" / ".step-00000003.claim").write_text("lost 12")
    (run_dir / "checkpoints" / ".step-00000003~lost~12.partial").mkdir()
    run.resume(run_dir, ["training.steps=3"])
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        f"step-0000000{step}" for step in (1, 2, 3)
    ]


def steps_of_all_ranks(config: RunConfig) -> list[int]:
    """The step that each rank goes on from, if each has found another one."""
    with process_groups(config):
        mine = CheckpointFolder(Path("x"), 5 + 5 * dist.get_rank())
        found = run._that_of_rank0(Path("x"), mine)
        assert found is not None
        everyone: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(everyone, found.step)
    return everyone


def test_ranks_that_looked_at_different_moments_go_on_from_the_same_checkpoint(tmp_path: Path) -> None:
    found = run_on_ranks(2, {"": configuration(MMDIT, recurrent=False)}, tmp_path, steps_of_all_ranks)
    assert found[""] == [5, 5]


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
            remove_old(tmp_path / "run", CheckpointConfig(keep_last=1), step=9)
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
