"""A precomputed set follows its source: what was written to since is encoded anew, what was not is kept, and both are told."""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from rmoe_megatron.config.model import EncodersConfig
from rmoe_megatron.config.run import Latents, RunConfig, Storage
from rmoe_megatron.data.shards.dataset import ShardDataset
from rmoe_megatron.errors import UserError
from rmoe_megatron.precompute.job import check_precompute, precompute
from rmoe_megatron.precompute.shard import ShardEncoder
from tests.data.test_shards import png
from tests.precompute.test_job import contents, toy
from tests.support.runs import write_shard


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that are encoded, as they are."""
    names: list[str] = []
    encode = ShardEncoder.encode

    def noted(self: ShardEncoder, shard: Path, target: Path) -> dict[str, dict[str, int]]:
        names.append(shard.stem)
        return encode(self, shard, target)

    monkeypatch.setattr(ShardEncoder, "encode", noted)
    return names


def edit(shard: Path, label: bytes) -> None:
    """Write the shard anew with another class: the same size, and the same time of modification."""
    before = shard.stat()
    write_shard(shard, [{"png": png(7), "cls": label}] * 2)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = shard.stat()
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)


def labels(out: Path) -> list[int]:
    samples = ShardDataset(out / "train", ["cls"])
    return [samples[index]["cls"] for index in range(len(samples))]


def test_a_shard_that_was_edited_is_encoded_anew_and_no_other(
    tmp_path: Path, encoded: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    config, source = toy(tmp_path)
    out = tmp_path / "out"
    assert precompute(config, source, out)
    assert precompute(config, source, out)
    assert encoded == ["0", "1", "2"]
    (out / "notes.txt").write_text("of a user")
    labels(out)  # makes an index, which is of the old shards
    kept = (out / "train" / "0.tar").stat().st_ino
    edit(source / "train" / "1.tar", b"0")
    with caplog.at_level(logging.WARNING):
        assert precompute(config, source, out)
    assert encoded == ["0", "1", "2", "1"]
    assert f"{source}/train/1.tar has changed since it was encoded" in caplog.text
    assert labels(out) == [1, 1, 0, 0, 1, 1]
    assert (out / "train" / "0.tar").stat().st_ino == kept
    assert (out / "notes.txt").read_text() == "of a user"
    assert not list(tmp_path.glob(".*"))
    assert not (out / ".sources").exists()
    records = [json.loads(line) for line in (out / "sources.jsonl").read_text().splitlines()]
    for record, name in zip(records, ["train/0.tar", "train/1.tar", "train/2.tar"], strict=True):
        path = source / name
        assert record["shard"] == name
        assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (record["size"], record["modified"]) == (path.stat().st_size, path.stat().st_mtime_ns)


def test_a_source_that_was_copied_is_the_same(tmp_path: Path, encoded: list[str]) -> None:
    config, source = toy(tmp_path)
    assert precompute(config, source, tmp_path / "out")
    source.rename(tmp_path / "old")
    shutil.copytree(tmp_path / "old", source, copy_function=shutil.copyfile)
    shutil.rmtree(tmp_path / "old")
    assert check_precompute(
        config, source, tmp_path / "out"
    )  # the times are others: the contents are compared
    assert precompute(config, source, tmp_path / "out")
    assert encoded == ["0", "1", "2"]
    assert not check_precompute(config, source, tmp_path / "out")
    assert len(contents(tmp_path / "out")) == 5


def test_shards_come_and_go(tmp_path: Path, encoded: list[str], caplog: pytest.LogCaptureFixture) -> None:
    config, source = toy(tmp_path)
    assert precompute(config, source, tmp_path / "out")
    (source / "train" / "0.tar").unlink()
    write_shard(source / "train" / "3.tar", [{"png": png(7), "cls": b"1"}])
    with caplog.at_level(logging.WARNING):
        assert precompute(config, source, tmp_path / "out")
    assert encoded == ["0", "1", "2", "3"]
    assert "no longer has what was made of 1 shards" in caplog.text
    assert sorted(path.name for path in (tmp_path / "out" / "train").glob("*.tar")) == [
        "1.tar",
        "2.tar",
        "3.tar",
    ]


def test_parts_before_and_after_an_edit_are_not_published_together(
    tmp_path: Path, encoded: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    config, source = toy(tmp_path)
    out = tmp_path / "out"
    assert not precompute(config, source, out, (0, 2))
    edit(source / "train" / "0.tar", b"0")
    with caplog.at_level(logging.WARNING):
        assert not precompute(config, source, out, (1, 2))
    assert not out.exists()
    assert "train/0.tar changed" in caplog.text
    assert "run all parts again" in caplog.text
    assert precompute(config, source, out, (0, 2))
    assert encoded == ["0", "2", "1", "0"]
    assert labels(out) == [0, 0, 1, 1, 1, 1]


def test_a_shard_that_is_written_to_while_it_is_encoded_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, source = toy(tmp_path, shards=1)
    encode = ShardEncoder.encode

    def meanwhile(self: ShardEncoder, shard: Path, target: Path) -> dict[str, dict[str, int]]:
        places = encode(self, shard, target)
        edit(shard, b"0")
        return places

    with monkeypatch.context() as patch:
        patch.setattr(ShardEncoder, "encode", meanwhile)
        with pytest.raises(UserError, match=r"train/0\.tar was written to while it was encoded"):
            precompute(config, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert precompute(config, source, tmp_path / "out")
    assert labels(tmp_path / "out") == [0, 0]


def test_a_shard_that_nothing_is_known_of_is_encoded_anew(tmp_path: Path, encoded: list[str]) -> None:
    """A process was killed after it had put the shard in place and before it had said what it was made of."""
    config, source = toy(tmp_path)
    assert not precompute(config, source, tmp_path / "out", (0, 2))
    (record,) = (tmp_path / ".out.partial" / ".sources" / "train").glob("0.tar.json")
    record.unlink()
    assert precompute(config, source, tmp_path / "out")
    assert encoded == ["0", "2", "0", "1"]


def test_a_process_killed_while_it_publishes_loses_nothing(
    tmp_path: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, source = toy(tmp_path)
    out = tmp_path / "out"
    assert precompute(config, source, out)
    edit(source / "train" / "1.tar", b"0")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rmoe_megatron.files.atomic.put_in_place", killed)
        with pytest.raises(KeyboardInterrupt):
            precompute(config, source, out)
    assert labels(out) == [1] * 6  # the old set is whole
    assert precompute(config, source, out)
    assert encoded == ["0", "1", "2", "1"]
    assert labels(out) == [1, 1, 0, 0, 1, 1]
    assert not list(tmp_path.glob(".*"))


def changed(config: RunConfig, what: str) -> RunConfig:
    asked, data = config.data.precompute, config.data
    return {
        "storage": replace(config, data=replace(data, precompute=replace(asked, storage=Storage.bfloat16))),
        "flips": replace(config, data=replace(data, precompute=replace(asked, flips=True))),
        "sample_size": replace(config, model=replace(config.model, sample_size=2)),
        "upscale": replace(config, data=replace(data, upscale=True)),
    }[what]


@pytest.mark.parametrize("what", ["storage", "flips", "sample_size", "upscale"])
def test_a_set_of_other_settings_is_not_taken_for_this_one(tmp_path: Path, what: str) -> None:
    config, source = toy(tmp_path, shards=1)
    assert precompute(config, source, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="was precomputed with other encoders or settings"):
        precompute(changed(config, what), source, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_pixels_have_no_distribution(tmp_path: Path) -> None:
    config, source = toy(tmp_path, shards=1)
    asked = replace(config.data.precompute, latents=Latents.distribution)
    assert config.encoders == EncodersConfig(autoencoder="pixel")
    with pytest.raises(UserError, match=r"data\.precompute\.latents=distribution needs an autoencoder"):
        precompute(replace(config, data=replace(config.data, precompute=asked)), source, tmp_path / "out")
