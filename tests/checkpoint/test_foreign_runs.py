"""Run folders that others made or a crash left: what is malformed in them is named, and nothing else happens."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmoe_megatron.checkpoint.folders import (
    checkpoint_path,
    find_checkpoint,
    list_checkpoints,
    read_state,
    remove_old,
    write_manifest,
)
from rmoe_megatron.checkpoint.weights import RunWeights
from rmoe_megatron.cli.options import read_prompts
from rmoe_megatron.config.run import CheckpointConfig, LoggingConfig
from rmoe_megatron.conversion.export import export_run
from rmoe_megatron.errors import UserError
from rmoe_megatron.training.curves import draw_curves, read_records
from rmoe_megatron.training.logging import CURVES, METRICS, WANDB_ID, RunLogger
from tests.conversion.test_import_export import import_model
from tests.pretrained.test_foreign_folders import (
    assert_one_sentence,
    cheap,
    copy_folder,
    mutations,
    outcome,
    replace_file,
)
from tests.support.diffusers_models import save_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    save_model("dit", folder / "model")
    import_model(folder / "model", folder / "run")
    return folder / "run"


def sign(path: Path) -> None:
    """Give a changed checkpoint a manifest that fits, as its author would."""
    write_manifest(path)


def test_a_file_in_the_place_of_a_folder_is_named(run: Path, tmp_path: Path) -> None:
    copy_folder(run, tmp_path / "run")
    step = tmp_path / "run" / "checkpoints" / "step-00000010"
    step.write_text("")
    for action in (
        list_checkpoints,
        find_checkpoint,
        RunWeights,
        lambda run: remove_old(run, CheckpointConfig(keep_last=1), 20),
    ):
        with pytest.raises(UserError, match="step-00000010 is no folder"):
            action(tmp_path / "run")  # type: ignore[operator]
    step.unlink()
    (tmp_path / "run" / "checkpoints" / "step-00000020.partial").write_text("")
    remove_old(tmp_path / "run", CheckpointConfig(keep_last=1), 20)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000000"]
    (tmp_path / "other").mkdir()
    for make in (lambda path: path.write_text(""), os.mkfifo, lambda path: path.symlink_to(path)):
        make(tmp_path / "other" / "checkpoints")
        with pytest.raises(UserError, match="checkpoints is no folder"):
            list_checkpoints(tmp_path / "other")
        (tmp_path / "other" / "checkpoints").unlink()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("run_state.json", "{}"),
        ("run_state.json", "[]"),
        ("run_state.json", '{"step": "0", "samples": 0}'),
        ("run_state.json", '{"step": -1, "samples": 0}'),
        ("run_state.json", '{"step": 0, "samples": 0, "base_fingerprint": 3}'),
        ("config.yaml", "model: {num_layers: 100000000}"),
        ("config.yaml", "- 3"),
        ("config.yaml", "{"),
    ],
)
def test_a_checkpoint_that_says_nonsense_is_refused(
    file: str, content: str, run: Path, tmp_path: Path
) -> None:
    copy_folder(run, tmp_path / "run")
    path = list_checkpoints(tmp_path / "run")[0].path
    if content.startswith("model"):
        saved = (path / file).read_text()
        content = saved.replace("num_layers: 3", "num_layers: 100000000")
        assert content != saved
    replace_file(path / file, content.encode())
    sign(path)
    with pytest.raises(UserError) as raised:
        read_state(RunWeights(tmp_path / "run").checkpoint.path)
    assert_one_sentence(raised.value)
    assert str(path / file) in str(raised.value)


FILES = ("manifest.json", "run_state.json", "metadata.json")


@given(data=st.data())
@cheap
def test_a_changed_file_of_a_checkpoint_is_read_or_refused(
    data: st.DataObject, run: Path, tmp_path: Path
) -> None:
    copy_folder(run, tmp_path / "run")
    path = list_checkpoints(tmp_path / "run")[0].path
    file = data.draw(st.sampled_from(FILES))
    replace_file(path / file, data.draw(mutations((path / file).read_bytes())))
    if file != "manifest.json":
        sign(path)
    outcome(lambda: RunWeights(tmp_path / "run").fingerprint())


@given(
    key=st.sampled_from(["num_layers", "hidden_size", "num_attention_heads", "in_channels", "patch_size", "sample_size",
                         "num_classes", "learned_sigma", "qk_norm", "architecture", "mlp_norm_eps"]),
    value=st.sampled_from([0, -1, 1, 2, 4, 6, 64, 10**9, 2**70, "x", None, True, [], 0.5, float("nan"), "mmdit"]),
)  # fmt: skip
@cheap
def test_a_changed_configuration_is_exported_or_refused(
    key: str, value: object, run: Path, tmp_path: Path
) -> None:
    import yaml

    copy_folder(run, tmp_path / "run")
    path = list_checkpoints(tmp_path / "run")[0].path
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["model"][key] = value
    replace_file(path / "config.yaml", yaml.safe_dump(config).encode())
    sign(path)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    outcome(lambda: export_run(tmp_path / "run", tmp_path / "out"))


RECORDS = [{"step": step, "loss": 1.0 / step, "grad_norm": None, "samples": 8 * step} for step in range(1, 6)]
VALID = "".join(json.dumps(record) + "\n" for record in RECORDS)


def open_log(folder: Path) -> None:
    log = RunLogger(folder, LoggingConfig(tensorboard=False), 10, 3, is_rank0=True)
    log.draw_curves()
    log.close()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[1]\n", "Line 1 of .*metrics.jsonl holds"),
        (b'{"step": 1}\n3\n', "Line 2 of .*metrics.jsonl holds 3"),
        (b'{"loss": 1}\n', "Line 1 of .*metrics.jsonl has no step"),
        (b'{"step": "1"}\n', 'has step "1"'),
        (b'{"step": -1}\n', "has no step"),
        (b'{"step": 1, "loss": [1]}\n', "has loss"),
        (b'{"step": 1, \n{"step": 2}\n', "Line 1 of .*metrics.jsonl is not valid JSON"),
    ],
)
def test_metrics_that_are_none_are_refused(content: bytes, complaint: str, tmp_path: Path) -> None:
    (tmp_path / METRICS).write_bytes(content)
    with pytest.raises(UserError, match=complaint) as raised:
        open_log(tmp_path)
    assert_one_sentence(raised.value)
    assert (tmp_path / METRICS).read_bytes() == content  # kept for its owner


def test_metrics_that_are_no_file_are_refused(tmp_path: Path) -> None:
    makers: list[Callable[[Path], Any]] = [Path.mkdir, os.mkfifo]
    for number, make in enumerate(makers):
        (tmp_path / str(number)).mkdir()
        make(tmp_path / str(number) / METRICS)
        with pytest.raises(UserError, match="no regular file"):
            open_log(tmp_path / str(number))


@given(data=st.data())
@cheap
def test_changed_metrics_are_continued_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    lines = VALID.splitlines(keepends=True)
    number = data.draw(st.integers(0, len(lines) - 1))
    changed = data.draw(mutations(lines[number].encode()))
    (tmp_path / METRICS).write_bytes(
        b"".join(
            [
                *(line.encode() for line in lines[:number]),
                changed,
                *(line.encode() for line in lines[number + 1 :]),
            ]
        )
    )
    outcome(lambda: open_log(tmp_path))


def test_records_are_kept_as_they_are(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text(VALID + '{"step": 6, "lo')
    assert read_records(tmp_path / METRICS) == [(record["step"], record) for record in RECORDS]
    open_log(tmp_path)
    assert (tmp_path / METRICS).read_text() == "".join(VALID.splitlines(keepends=True)[:3])
    assert (tmp_path / CURVES).read_bytes() == draw_curves(tmp_path / METRICS)


def test_an_id_of_wandb_is_a_name(tmp_path: Path) -> None:
    for content in (b"\xff", b"a b", b"", b"../x", b"x" * 2000):
        (tmp_path / WANDB_ID).write_bytes(content)
        with pytest.raises(UserError, match=WANDB_ID):
            RunLogger(tmp_path, LoggingConfig(tensorboard=False, wandb={"mode": "offline"}), 10, 0, True)


def test_prompts_are_text(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"a cat\n\xff\xfe\n")
    for path in (tmp_path / "prompts.txt", tmp_path, tmp_path / "nul\0byte", tmp_path / "missing"):
        with pytest.raises(UserError) as raised:
            read_prompts([], path)
        assert_one_sentence(raised.value)
    (tmp_path / "prompts.txt").write_text("a cat\n\n two red circles \n")
    assert read_prompts(["x"], tmp_path / "prompts.txt") == ["x", "a cat", "two red circles"]


def test_a_damaged_later_checkpoint_keeps_no_other_out(tmp_path: Path) -> None:
    """A run that went on from step 500 because 1000 is damaged saves at 600."""
    for step in (400, 500, 600, 1000):
        checkpoint_path(tmp_path, step).mkdir(parents=True)
    remove_old(tmp_path, CheckpointConfig(keep_last=1), step=600)
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [1000, 600]
