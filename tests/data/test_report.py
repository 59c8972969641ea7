"""`rmoe data check` counts what is in shards: made by hand, so that every number is known."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rmoe_megatron.config.captions import parse_captions
from rmoe_megatron.data.report import inspect_shards, lines, write_report
from rmoe_megatron.data.samples import SampleFormat
from rmoe_megatron.errors import UserError
from tests.data.test_index import picture
from tests.support.commands import rmoe
from tests.support.runs import array, write_shard


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    first = [{"jpg": picture(40, 20), "txt": b"four"}, {"png": picture(40, 20, "png"), "txt": b""}]
    second = [
        {"png": picture(16, 64, "png"), "txt": "Fuß".encode()}, {"jpg": b"none", "txt": b"x"},
        {"jpg": picture(8, 8)}, {"png": picture(8, 8, "png"), "txt": b"\xff"},
    ]  # fmt: skip
    write_shard(data / "a.tar", first)
    write_shard(data / "b.tar", second)
    return data


def test_everything_is_counted(folder: Path, tmp_path: Path) -> None:
    report = inspect_shards(folder, SampleFormat())
    assert report.sizes == [(40, 20), (40, 20), (16, 64)]
    assert report.captions == [4, 0, 4]
    assert [(shard, key) for shard, key, _ in report.damaged] == [("b.tar", "000001"), ("b.tar", "000003")]
    assert report.duplicates == [("a.tar/000001", "a.tar/000000")]  # black in both formats
    assert report.members == {"jpg, txt": 2, "png, txt": 3, "jpg": 1}
    text = "\n".join(lines(report))
    assert "3 usable, 2 not" in text
    assert "empty captions 1" in text
    tokens = 2 * (3 * 2) + 1 * 4  # pieces of 16 pixels
    assert f"about {tokens} of pictures" in text
    assert "2 of text" in text
    write_report(report, tmp_path / "out")
    written = [json.loads(line) for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
    assert [(each["shard"], each["key"]) for each in written] == [("b.tar", "000001"), ("b.tar", "000003")]
    assert (tmp_path / "out" / "report.txt").read_text() == text + "\n"
    sheet = np.asarray(Image.open(tmp_path / "out" / "sheet.png"))
    # Three pictures on white; the third is upright, with white to both sides of it.
    assert (sheet == 0).all(axis=2).sum() == pytest.approx(2 * 128 * 64 + 128 * 32, rel=0.05)
    assert Image.open(tmp_path / "out" / "histograms.png").size[0] > 1000


def test_the_command(folder: Path, tmp_path: Path) -> None:
    code, errors = rmoe("data", "check", str(folder), str(tmp_path / "out"))
    assert code == 0, errors
    assert "3 usable, 2 not" in (tmp_path / "out" / "report.txt").read_text()
    code, errors = rmoe("data", "check", str(folder), str(tmp_path / "out"))
    assert (code, "not an empty folder" in errors) == (2, True)


def test_what_has_nothing_to_check(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no samples with members json"):
        inspect_shards(folder, SampleFormat(captions=parse_captions(["json:caption"])))
    write_shard(tmp_path / "latents" / "a.tar", [{"latents.npy": array(np.ones((1, 2, 2))), "txt": b"x"}])
    with pytest.raises(UserError, match="precomputed"):
        inspect_shards(tmp_path / "latents", SampleFormat())
