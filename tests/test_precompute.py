"""Precomputation of shards: where the output may lie, and what of a source can be encoded."""

import io
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest

from rmoe_megatron.data.shards import LATENTS, ShardDataset
from rmoe_megatron.errors import UserError
from rmoe_megatron.hf.pixel_codec import PixelCodec
from rmoe_megatron.precompute import encode_shard, precompute
from tests.data.test_shards import picture, png
from tests.support.configurations import tiny_config
from tests.support.runs import write_shard


@pytest.mark.parametrize(("source", "out"), [("a", "a"), ("a", "a/b"), ("a/b", "a"), ("a", "c/../a/b")])
def test_source_and_output_lie_apart(tmp_path: Path, source: str, out: str) -> None:
    (tmp_path / "c").mkdir()
    write_shard(tmp_path / source / "a.tar", [{"png": png(1), "txt": b"x"}])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="overlap"):
        precompute(tiny_config(), tmp_path / source, tmp_path / out)
    assert sorted(tmp_path.rglob("*")) == before


def test_samples_that_cannot_be_encoded_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, target = tmp_path / "source.tar", tmp_path / "encoded.tar"
    samples = [{"png": png(value), "cls": b"1"} for value in (0, 128, 255)]
    write_shard(source, [*samples, {"cls": b"1"}, {"png": picture("png", "RGB", 5), "cls": b"1"}])
    with caplog.at_level(logging.WARNING):
        encode_shard(source, target, None, PixelCodec())
    encoded = ShardDataset(tmp_path, shards=[target])
    assert [location.key for location in encoded.locations] == ["000000", "000001", "000002"]
    with tarfile.open(target) as tar:
        names = tar.getnames()
    assert len(names) == len(set(names)) == 6  # nothing is written twice in the place of what cannot be read
    for index, value in enumerate((0, 128, 255)):
        expected = np.full((3, 4, 4), (value / 127.5 - 1 + 0.55) * 2.5, dtype=np.float16)
        assert np.allclose(encoded[index][LATENTS], expected, rtol=1e-3)
    assert "1 of the 5 samples" in caplog.text
    assert "Sample 000004" in caplog.text


def test_long_names_are_kept(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "source.tar", "w") as tar:
        header = tarfile.TarInfo(f"{'long' * 50}.png")
        header.size = len(png(1))
        tar.addfile(header, io.BytesIO(png(1)))
    encode_shard(tmp_path / "source.tar", tmp_path / "encoded.tar", None, PixelCodec())
    assert ShardDataset(tmp_path, shards=[tmp_path / "encoded.tar"])[0]["__key__"] == "long" * 50
