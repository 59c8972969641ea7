"""What is told of a run: its checkpoints and their damage, its restarts."""

from pathlib import Path

import pytest

from rmoe_megatron.checkpoint.folders import list_checkpoints
from rmoe_megatron.errors import UserError
from rmoe_megatron.inspection.run import show_run
from tests.support.commands import rmoe
from tests.support.runs import make_run


def test_checkpoints_and_restarts_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    run_dir = tmp_path / "run"
    assert rmoe("train", str(make_run(tmp_path)), "training.steps=5", "training.sample_prompts=[]")[0] == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert rmoe("train", "--resume", str(run_dir), "training.steps=6", "training.sample_every=6")[0] == 0
    shard = next(list_checkpoints(run_dir)[1].path.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    first, newest, damaged, restarts, *events = show_run(run_dir)
    assert first == "checkpoints  2, newest first"
    assert newest.startswith("  step        6")
    assert newest.endswith("GB  verified")
    assert "is damaged" in damaged
    assert "checksum" in damaged
    assert restarts == "restarts     1"
    assert [(event.split()[1], event.split("  ", 2)[2].split(None, 1)[1]) for event in events] == [
        ("started", "step        0  1 rank  job 41.0"),
        ("finished", "step        5  1 rank  job 41.0"),
        ("resumed", "step        5  1 rank  job 41.1"),
        ("finished", "step        6  1 rank  job 41.1"),
    ]
    assert all(line.endswith("not verified") for line in list(show_run(run_dir, quick=True))[1:3])


def test_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no run"):
        list(show_run(tmp_path))
