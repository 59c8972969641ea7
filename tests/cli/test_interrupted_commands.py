"""Ctrl-C in a command that makes many files: what is finished stays, one sentence says so, and the same command goes on from there."""

import io
import os
import shlex
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rmoe_megatron.cli.app import app
from rmoe_megatron.config.buckets import Bucket
from rmoe_megatron.data.packing import pack as packing
from rmoe_megatron.data.packing.pack import pack
from rmoe_megatron.errors import Interrupted
from rmoe_megatron.files import atomic
from rmoe_megatron.inference import generation
from rmoe_megatron.inference.generation import Sampling
from rmoe_megatron.inference.provenance import read_record
from rmoe_megatron.inference.sample_folder import fill_folder
from tests.hf.test_pipelines import recurrent_dit
from tests.support.commands import finish, kill, rmoe, start
from tests.support.runs import make_run


def write_pictures(folder: Path, number: int) -> Path:
    folder.mkdir(parents=True)
    for index in range(number):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (index % 256, index // 256, 0)).save(buffer, format="png")
        (folder / f"{index:04d}.png").write_bytes(buffer.getvalue())
        (folder / f"{index:04d}.txt").write_text(f"number {index}")
    return folder


class CtrlC:
    """A progress callback in which Ctrl-C comes when so much is done."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, done: int, total: int) -> None:
        if done == self.at:
            raise KeyboardInterrupt


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".rmoe_index"}


def test_pack_goes_on_after_its_last_whole_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_pictures(tmp_path / "mine", 7)
    (source / "0001.txt").unlink()  # it is left out
    pack(source, tmp_path / "whole", samples_per_shard=2)
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "out", samples_per_shard=2, progress=CtrlC(at=6))
    # Pictures 0 and 2 are a shard, 3 and 4 the next one; 5 was in the third.
    (kept,) = tmp_path.glob(".out*partial")
    assert {path.name for path in kept.glob("*.tar")} == {"000000.tar", "000001.tar"}
    assert not (tmp_path / "out").exists()
    read: list[bytes] = []
    decode = packing.decode_image
    monkeypatch.setattr(packing, "decode_image", lambda content: [read.append(content), decode(content)])
    told: list[tuple[int, int]] = []
    packed = pack(source, tmp_path / "out", samples_per_shard=2, progress=lambda *done: told.append(done))
    assert read == [(source / f"{index:04d}.png").read_bytes() for index in (5, 6)]
    assert told == [(6, 7), (7, 7)]
    assert (packed.samples, packed.shards, packed.left_out) == (6, 3, [("0001.png", "it has no caption")])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".out*partial"))


@pytest.mark.parametrize("change", ["caption", "picture", "settings"])
def test_pack_begins_anew_where_what_is_finished_is_of_something_else(tmp_path: Path, change: str) -> None:
    source = write_pictures(tmp_path / "mine", 5)
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "out", samples_per_shard=2, progress=CtrlC(at=3))
    per_shard = 2
    if change == "caption":
        (source / "0000.txt").write_text("another caption")
    elif change == "picture":
        (source / "0001.png").unlink()
    else:
        per_shard = 4
    pack(source, tmp_path / "whole", samples_per_shard=per_shard)
    packed = pack(source, tmp_path / "out", samples_per_shard=per_shard)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert [note for note in packed.notes if "packed anew" in note]


def test_pack_leaves_nothing_where_no_shard_is_whole(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "mine", 3)
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "out", progress=CtrlC(at=2))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_samples_go_on_after_the_last_whole_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recurrent_dit(tmp_path / "dit")
    made: list[list[str]] = []
    sample_images = generation.sample_images

    def counted(pipeline: Any, prompts: list[str], *arguments: Any, **named: Any) -> Any:
        made.append(prompts)
        return sample_images(pipeline, prompts, *arguments, **named)

    monkeypatch.setattr(generation, "sample_images", counted)
    prompts, sampling = ["1", "2", "3", "4", "5"], Sampling(str(tmp_path / "dit"), 1, 2.0, 0, batch_size=2)
    fill_folder(tmp_path / "whole", prompts, sampling)
    with pytest.raises(KeyboardInterrupt):
        fill_folder(tmp_path / "out", prompts, sampling, progress=CtrlC(at=4))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"{number:05d}.png" for number in range(4)
    ]
    (tmp_path / "out" / "00001.png").unlink()  # its batch is made again as a whole
    made.clear()
    fill_folder(tmp_path / "out", prompts, sampling)
    assert made == [["1", "2"], ["5"]]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    made.clear()
    fill_folder(tmp_path / "out", prompts, sampling)
    assert made == []
    others = fill_folder(tmp_path / "out", prompts[:3], replace(sampling, steps=2))
    assert made == [["1", "2"], ["3"]]
    assert [path.name for path in others] == ["00003.png", "00004.png"]
    assert (read_record(tmp_path / "out" / "00000.png") or {})["steps"] == 2
    assert (read_record(tmp_path / "out" / "00003.png") or {})["steps"] == 1


def test_samples_of_another_size_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recurrent_dit(tmp_path / "dit")
    sides: list[int] = []

    def blank(
        pipeline: Any, prompts: list[str], *arguments: Any, size: Bucket | None, **named: Any
    ) -> np.ndarray:
        side = 8 if size is None else size.height
        sides.append(side)
        return np.zeros((len(prompts), side, side, 3), dtype=np.uint8)

    monkeypatch.setattr(generation, "sample_images", blank)
    sampling = Sampling(str(tmp_path / "dit"), 1, 2.0, 0, batch_size=2)
    for size in (None, Bucket(16, 16), Bucket(16, 16)):
        fill_folder(tmp_path / "out", ["1"], replace(sampling, size=size))
    assert sides == [8, 16]


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["sample", "owner/model", "--prompt", "a cat", "--out", "{out}"], "images"),
        (["data", "pack", "{folder}/mine", "{out}"], "shards"),
        (["data", "precompute", "{config}", "{folder}/data/train", "{out}"], "shards"),
        (["eval", "shapes", "owner/model", "--data", "shapes", "--out", "{out}"], "pictures and verdicts"),
        (["eval", "geneval", "model", "--out", "{out}"], "pictures and verdicts"),
        (["eval", "geneval2", "model", "--data", "prompts", "--out", "{out}"], "pictures and verdicts"),
        (["eval", "dpg", "model", "--data", "table", "--out", "{out}"], "pictures and verdicts"),
        (["eval", "corebench", "model", "--data", "folder", "--out", "{out}"], "pictures and verdicts"),
        (["eval", "preference", "pictures", "--out", "{out}"], "pictures and verdicts"),
        (["eval", "imagenet", "model", "--reference", "a", "--inception", "b", "--out", "{out}"], "pictures and verdicts"),
    ],
)  # fmt: skip
def test_one_sentence_names_what_is_kept_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], kept: str
) -> None:
    def ctrl_c(folder: Path, name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "check_writable", ctrl_c)
    config = make_run(tmp_path)
    write_pictures(tmp_path / "mine", 1)
    command = [each.format(out=tmp_path / "out", folder=tmp_path, config=config) for each in arguments]
    monkeypatch.setattr(sys, "argv", ["rmoe", *command])
    with pytest.raises(Interrupted) as interruption:
        app(command, standalone_mode=False)
    assert interruption.value.code == 130
    assert str(interruption.value) == (
        f"Ctrl-C: the {kept} that are finished are kept; `rmoe {shlex.join(command)}` goes on from there."
    )


def test_ctrl_c_in_a_process_that_packs(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "mine", 300)
    command = ["data", "pack", str(source), str(tmp_path / "out"), "--samples-per-shard", "10"]
    process, deadline = start(command), time.monotonic() + 60
    try:
        while not list(tmp_path.glob(".out*partial/progress.json")):
            assert process.poll() is None, finish(process)
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        code, errors = finish(process, timeout=60)
    finally:
        if process.poll() is None:
            kill(process)
    assert code == 130, errors
    assert errors.splitlines()[-1] == (
        f"interrupted: Ctrl-C: the shards that are finished are kept; `rmoe {shlex.join(command)}` goes on from there."
    )
    assert "Traceback" not in errors
    (first,) = tmp_path.glob(".out*partial/000000.tar")
    written = first.stat().st_mtime_ns
    code, errors = rmoe(*command)
    assert code == 0, errors
    assert len(list((tmp_path / "out").glob("*.tar"))) == 30
    assert (tmp_path / "out" / "000000.tar").stat().st_mtime_ns == written
