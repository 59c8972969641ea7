"""Tars as people make them: on a Mac, in another order, with dots in names, with captions elsewhere. Read, or refused in words."""

import json
import logging
from pathlib import Path

import pytest

from rmoe_megatron.config.captions import parse_captions
from rmoe_megatron.data.samples import SampleFormat, TrainingDataset
from rmoe_megatron.data.shards import ShardDataset
from rmoe_megatron.errors import UserError
from tests.data.test_shards import png
from tests.support.runs import write_members

APPLE_DOUBLE = b"\0\5\x16\7" + bytes(159)


@pytest.mark.parametrize("folder", ["", "train/", "./deep/er/"])
@pytest.mark.parametrize("attributes", [{0, 1, 2}, {1}, set()], ids=["all", "some", "none"])
def test_what_a_mac_adds_is_passed_over(tmp_path: Path, folder: str, attributes: set[int]) -> None:
    members: list[tuple[str, bytes]] = [(f"{folder}.DS_Store", b"x" * 600)]
    for number in range(3):
        for name, content in ((f"{number}.png", png(number)), (f"{number}.txt", f"a {number}".encode())):
            if number in attributes:
                members.append((f"{folder}._{name}", APPLE_DOUBLE))
            members.append((folder + name, content))
    members += [(f"__MACOSX/{folder}._0.png", APPLE_DOUBLE), (f"__MACOSX/{folder}0.txt", b"no caption")]
    write_members(tmp_path / "a.tar", members)
    dataset = TrainingDataset(tmp_path, SampleFormat())
    drawn = [dataset.draw(index, 0) for index in range(len(dataset))]
    assert [(each["caption"], int(each["image"][0, 0, 0])) for each in drawn] == [
        ("a 0", 0),
        ("a 1", 1),
        ("a 2", 2),
    ]


def test_long_names_beside_litter_are_read(tmp_path: Path) -> None:
    """Names of more than 100 characters have headers of their own, which are read in another way."""
    name = "n" * 120
    write_members(
        tmp_path / "a.tar",
        [(f"{name}.png", png(5)), (f"._{name}.txt", APPLE_DOUBLE), (f"{name}.txt", b"long")],
    )
    assert ShardDataset(tmp_path)[0]["txt"] == "long"


def test_members_that_do_not_lie_side_by_side_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = [((f"{n}.png", png(n)), (f"{n}.txt", b"a")) for n in range(3)]
    by_kind = [first for first, _ in pairs] + [second for _, second in pairs]
    write_members(tmp_path / "a" / "0.tar", by_kind)
    with pytest.raises(UserError, match="do not lie side by side"):
        TrainingDataset(tmp_path / "a", SampleFormat())
    write_members(tmp_path / "b" / "0.tar", by_kind)
    write_members(tmp_path / "b" / "1.tar", [member for pair in pairs for member in pair])
    with caplog.at_level(logging.WARNING):
        assert len(TrainingDataset(tmp_path / "b", SampleFormat())) == 3
    assert any("side by side" in record.getMessage() for record in caplog.records)


def test_dots_in_names_are_told(tmp_path: Path) -> None:
    write_members(tmp_path / "0.tar", [("img.001.png", png(1)), ("img.001.txt", b"a")])
    with pytest.raises(UserError, match=r"there are members \*\.001\.png: of a name with several dots"):
        TrainingDataset(tmp_path, SampleFormat())


@pytest.mark.parametrize(
    ("member", "content", "source"),
    [("caption", b"a cat", "caption"), ("json", json.dumps({"long": "a cat"}).encode(), "json:long")],
)
def test_captions_elsewhere_are_told_and_found(
    tmp_path: Path, member: str, content: bytes, source: str
) -> None:
    write_members(tmp_path / "0.tar", [("0.png", png(1)), (f"0.{member}", content)])
    with pytest.raises(UserError, match=rf"data\.captions=\[{source.replace('long', 'KEY')}\]"):
        TrainingDataset(tmp_path, SampleFormat())
    found = TrainingDataset(tmp_path, SampleFormat(captions=parse_captions([source])))
    assert found.draw(0, 0)["caption"] == "a cat"
