"""Captions from text, from JSON, several with weights: the choice is the draw's."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rmoe_megatron.config.captions import CaptionSource, parse_captions
from rmoe_megatron.data.training_dataset import BadSample, SampleFormat, TrainingDataset
from rmoe_megatron.errors import UserError
from tests.data.test_shards import png
from tests.support.runs import write_shard


def test_sources_are_read() -> None:
    assert parse_captions(["txt", "caption=2", "json:long caption=0.25"]) == (
        CaptionSource("txt"), CaptionSource("caption", None, 2.0), CaptionSource("json", "long caption", 0.25),
    )  # fmt: skip


@pytest.mark.parametrize(
    "entries", [[], ["text"], ["json:"], ["json"], ["txt=0"], ["txt=nan"], ["txt=x"], ["txt", "txt=2"], ["txt=1=2"]]
)  # fmt: skip
def test_what_is_no_source_is_refused(entries: list[str]) -> None:
    with pytest.raises(UserError, match=r"data\.captions"):
        parse_captions(entries)


def dataset(folder: Path, samples: list[dict[str, Any]], *captions: str) -> TrainingDataset:
    write_shard(folder / "a.tar", [{"png": png(1), **sample} for sample in samples])
    return TrainingDataset(folder, SampleFormat(captions=parse_captions(list(captions)), seed=3))


def test_every_layout_of_a_set_from_the_web(tmp_path: Path) -> None:
    described = json.dumps({"caption": "from JSON", "width": 4}).encode()
    samples = [
        {"txt": b"text", "json": described},
        {"caption": b"other"},
        {"json": described},
        {"json": b"[1]"},
    ]
    assert len(dataset(tmp_path, samples, "txt")) == 1
    assert dataset(tmp_path, samples, "caption").draw(0, 0)["caption"] == "other"
    found = dataset(tmp_path, samples, "json:caption")
    bad: list[BadSample] = []
    assert [found.draw(index, 0, bad)["caption"] for index in range(3)] == ["from JSON"] * 3
    assert [(each.key, each.reason) for each in bad] == [
        ("000003", "its JSON has no caption")
    ]  # the first takes its place


def test_weights_are_those_of_what_a_sample_has(tmp_path: Path) -> None:
    described = json.dumps({"long": "l"}).encode()
    found = dataset(tmp_path, [{"txt": b"t", "json": described}, {"txt": b"t"}], "txt=1", "json:long=3")
    counts = Counter(found.draw(0, draw)["caption"] for draw in range(4000))
    assert counts["t"] == pytest.approx(1000, abs=100)
    assert counts["l"] == 4000 - counts["t"]
    assert {found.draw(1, draw)["caption"] for draw in range(100)} == {"t"}
    again = dataset(tmp_path, [{"txt": b"t", "json": described}, {"txt": b"t"}], "txt=1", "json:long=3")
    chosen = [found.draw(0, draw)["caption"] for draw in range(100)]
    assert [again.draw(0, draw)["caption"] for draw in reversed(range(100))] == chosen[::-1]


def test_an_empty_caption_is_one(tmp_path: Path) -> None:
    assert dataset(tmp_path, [{"txt": b""}], "txt").draw(0, 0)["caption"] == ""
