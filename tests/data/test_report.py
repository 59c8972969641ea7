"""`rmoe data check` counts what is in shards: made by hand, so that every number is known."""

import json
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rmoe_megatron.config.buckets import Bucket
from rmoe_megatron.config.captions import parse_captions
from rmoe_megatron.config.sample_filter import SampleFilter
from rmoe_megatron.data.page import left_out, write_page
from rmoe_megatron.data.report import inspect_shards, lines, write_report
from rmoe_megatron.data.shards.bucketing import Bucketing
from rmoe_megatron.data.training_dataset import SampleFormat
from rmoe_megatron.errors import UserError
from tests.data.test_index import picture
from tests.support.commands import rmoe
from tests.support.runs import array, make_run, write_shard


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


def test_processes_find_what_one_finds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(
        folder / "c.tar", [{"png": picture(8 + number % 3, 9, "png"), "txt": b"c"} for number in range(9)]
    )
    alone = inspect_shards(folder, SampleFormat(), shown=5)
    told: list[tuple[int, int]] = []
    monkeypatch.setattr("rmoe_megatron.data.report.SPAN", 3)
    together = inspect_shards(folder, SampleFormat(), lambda *done: told.append(done), 2, 5)
    assert told[-1] == (14, 14)
    for name in ("sizes", "captions", "damaged", "duplicates", "members", "lacking"):
        assert getattr(together, name) == getattr(alone, name), name
    assert len(together.duplicates) == 7  # of nine pictures there are three, and two more are the same
    assert [each.place for each in together.sheet] == [each.place for each in alone.sheet]
    for ours, theirs in zip(together.sheet, alone.sheet, strict=True):
        assert np.array_equal(ours.thumbnail, theirs.thumbnail)


def words(captions: list[str]) -> list[int]:
    return [len(caption.split()) for caption in captions]


class Found(HTMLParser):
    """What a page holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_shows_samples_and_says_what_is_left_out(folder: Path, tmp_path: Path) -> None:
    captions = ["a <b>bold</b> & 'quoted' caption", "one two three four five", "<script>alert(1)</script>"]
    write_shard(
        folder / "c.tar",
        [{"png": picture(70 + n, 50, "png"), "txt": text.encode()} for n, text in enumerate(captions)],
    )
    taken = SampleFormat(bucketing=Bucketing((Bucket(32, 32),)))
    report = inspect_shards(folder, taken, count_tokens=words)
    write_page(report, tmp_path / "page.html", folder, taken, text_length=4)
    page = Found((tmp_path / "page.html").read_text())
    assert page.tags["figure"] == 6
    assert page.tags["script"] == page.tags["b"] == 0
    assert all(text in page.text for text in captions)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert len(page.links) == 7  # the histograms too
    assert "2 of 6 captions (33.3%) have more than 4 tokens" in page.text
    assert "40 x 20, 2.00, 1 tokens" in page.text
    assert "a.tar/000001 has the pixels of a.tar/000000" in page.text
    assert "1 samples have only jpg; txt, png or jpg" in page.text
    assert "3 pictures are smaller than the model's 32x32" in page.text  # 40 x 20 twice, 16 x 64
    assert "b.tar, sample 000003: txt: it is no UTF-8 text" in page.text


def test_the_page_of_a_filter_and_of_buckets(folder: Path, tmp_path: Path) -> None:
    taken = SampleFormat(
        bucketing=Bucketing((Bucket(16, 16), Bucket(64, 64))),
        divides=True,
        filter=SampleFilter("caption_bytes > 0"),
    )
    told = left_out(inspect_shards(folder, taken), taken)
    assert "1 samples: the filter does not take them" in told
    assert not any("smaller than" in each for each in told)  # all are at least 16 x 16


def test_the_command_that_shows(folder: Path, tmp_path: Path) -> None:
    config = make_run(tmp_path / "run")
    code, errors = rmoe(
        "data", "show", str(folder), "--config", str(config), "--out", str(tmp_path / "a" / "page.html"), "data.upscale=true"
    )  # fmt: skip
    assert code == 0, errors
    page = Found((tmp_path / "a" / "page.html").read_text())
    # MiniLM's tokens of "four" and of "Fuß" (fu, ##ß or so) are at most four with the two special ones; the model takes six.
    assert "0 of 3 captions (0.0%) have more than 6 tokens" in page.text
    code, errors = rmoe("data", "show", str(folder), "--out", str(tmp_path / "page.html"))
    assert code == 0, errors
    assert "text_length" not in (tmp_path / "page.html").read_text()
