"""Which checkpoints of a run are kept, by hand; and those of a real run by its own record of validation losses."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from rmoe_megatron.checkpoint.folders import checkpoint_path, list_checkpoints, read_state, remove_old, verify
from rmoe_megatron.config.loading import load_config
from rmoe_megatron.config.run import CheckpointConfig
from rmoe_megatron.config.validation import validate
from rmoe_megatron.errors import UserError
from tests.support.commands import rmoe
from tests.support.runs import losses, make_run

LOSSES = {5: 0.9, 10: 0.3, 15: 0.5, 20: 0.4, 25: None, 30: 0.4, 35: 0.8}


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (CheckpointConfig(keep_last=2), [35, 30]),
        (CheckpointConfig(keep_last=1, keep_every=10), [35, 30, 20, 10]),
        (CheckpointConfig(keep_last=1, keep_best=1), [35, 10]),
        (CheckpointConfig(keep_last=1, keep_best=2), [35, 30, 10]),  # of two equal ones the newer
        (CheckpointConfig(keep_last=3, keep_best=2, keep_every=15), [35, 30, 25, 15, 10]),
    ],
)
def test_what_is_kept(settings: CheckpointConfig, steps: list[int], tmp_path: Path) -> None:
    for step, loss in LOSSES.items():
        path = checkpoint_path(tmp_path, step)
        path.mkdir(parents=True)
        (path / "run_state.json").write_text(
            json.dumps({"step": step, "samples": 0, "validation_loss": loss})
        )
    checkpoint_path(tmp_path, 2).mkdir()  # it has no state, and is the oldest
    remove_old(tmp_path, settings, step=35)
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == steps


def test_a_run_keeps_its_best(tmp_path: Path) -> None:
    """A learning rate that tears the model apart after some steps: the best checkpoint is none of the last."""
    config = make_run(tmp_path)
    settings = [
        "checkpoint.every=2", "checkpoint.keep_last=1", "checkpoint.keep_best=2", "checkpoint.keep_every=8", "training.validate_every=2",
        "training.sample_prompts=[]", "training.steps=12",
    ]  # fmt: skip
    code, errors = rmoe("train", str(config), *settings)
    assert code == 0, errors
    code, errors = rmoe(
        "train", "--resume", str(tmp_path / "run"), "training.steps=20", "optimizer.learning_rate=0.3"
    )
    assert code == 0, errors
    found = losses(tmp_path / "run", "validation_loss")
    best = sorted(found, key=lambda step: found[step])[:2]
    checkpoints = list_checkpoints(tmp_path / "run")
    assert [checkpoint.step for checkpoint in checkpoints] == sorted({8, 16, 20, *best}, reverse=True)
    for checkpoint in checkpoints:
        assert verify(checkpoint.path) is None
        assert read_state(checkpoint.path)["validation_loss"] == found[checkpoint.step]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["checkpoint.keep_every=7"],
            r"checkpoint\.keep_every \(7\) must be a multiple of checkpoint\.every \(5\)",
        ),
        (
            ["checkpoint.keep_best=1"],
            r"checkpoint\.keep_best \(1\) needs the validation loss",
        ),  # validated every ten
        (
            ["checkpoint.keep_best=1", "training.validate_every=5", "data.validation=null"],
            "needs the validation loss",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(overrides: list[str], words: str, tmp_path: Path) -> None:
    config = load_config(make_run(tmp_path), [])
    validate(config, 1)
    with pytest.raises(UserError, match=words):
        validate(load_config(tmp_path / "config.yaml", overrides), 1)
    kept = replace(config.checkpoint, keep_best=1, every=10)
    validate(replace(config, checkpoint=kept), 1)


def test_a_checkpoint_that_is_removed_in_part_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk takes the first file away and refuses the second."""
    for step in (1, 2):
        path = checkpoint_path(tmp_path, step)
        path.mkdir(parents=True)
        for name in ("a", "b", "c"):
            (path / name).write_text("")
    unlink, removed = os.unlink, list[str]()

    def fail_second(path: str, dir_fd: int | None = None) -> None:
        removed.append(path)
        if len(removed) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", fail_second)
    remove_old(tmp_path, CheckpointConfig(keep_last=1), step=2)
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [2]
    assert "Old checkpoints stay for now" in caplog.text
    assert len([path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]) == 3 + 2
    remove_old(tmp_path, CheckpointConfig(keep_last=1), step=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        checkpoint_path(tmp_path, 2).name
    ]
