"""Tars as people make them: on a Mac, in another order, with dots in names, with captions elsewhere. Read, or refused in words."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from rmoe_megatron.config.captions import parse_captions
from rmoe_megatron.config.sample_filter import SampleFilter
from rmoe_megatron.data.loader import BatchLayout, batches
from rmoe_megatron.data.order import GlobalOrder
from rmoe_megatron.data.shards.build_index import index_shards, open_index
from rmoe_megatron.data.shards.dataset import ShardDataset
from rmoe_megatron.data.storage.store import LocalStore
from rmoe_megatron.data.training_dataset import SampleFormat, TrainingDataset
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


def photographs(count: int) -> list[tuple[str, bytes]]:
    """Members of samples side by side: a picture whose value is its number, its caption, and JSON."""
    return [
        (f"folder/{number}.{extension}", content)
        for number in range(count)
        for extension, content in (
            ("png", png(number)),
            ("txt", f"a {number}".encode()),
            ("json", json.dumps({"number": number}).encode()),
        )
    ]


def arranged(members: list[tuple[str, bytes]], how: str) -> list[tuple[str, bytes]]:
    by_kind = sorted(members, key=lambda member: member[0].rpartition(".")[2])
    if how == "by kind":
        return by_kind
    if how == "backwards":
        return members[::-1]
    if how == "two of three side by side":
        return [member for member in members if not member[0].endswith("json")] + by_kind[: len(members) // 3]
    return [members[place] for place in np.random.default_rng(len(how)).permutation(len(members))]


HOW = ["by kind", "backwards", "two of three side by side", "at random", "at random again"]


def drawn(folder: Path, text: str | None = None, workers: int = 0, first: int = 0) -> list[tuple[str, int]]:
    """Captions and pixels of the draws of an epoch and a half from ``first`` on, as a run has them."""
    sample_filter = SampleFilter(text) if text is not None else None
    dataset = TrainingDataset(folder, SampleFormat(filter=sample_filter))
    order = GlobalOrder(len(dataset), shuffle=True, seed=3)
    layout = BatchLayout(2, 2, 0, 1)
    loaded = batches(dataset, order, layout, first, 3 * len(dataset) // 2 // 2 * 2, num_workers=workers)
    return [
        (caption, int(image[0, 0, 0]))
        for batch in loaded
        for caption, image in zip(batch["caption"], batch["image"], strict=True)
    ]


@pytest.mark.parametrize("how", HOW)
def test_members_need_not_lie_side_by_side(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    members = photographs(8)
    scattered = arranged(members, how)
    # The same samples in the order of their first members.
    keys = dict.fromkeys(name.partition(".")[0] for name, _ in scattered)
    together = [member for key in keys for member in members if member[0].partition(".")[0] == key]
    for name in "ab":  # of the second shard the first piece has not the number 0
        write_members(tmp_path / "scattered" / f"{name}.tar", scattered)
        write_members(tmp_path / "together" / f"{name}.tar", together)
    with caplog.at_level(logging.WARNING):
        expected = drawn(tmp_path / "together")
        assert drawn(tmp_path / "scattered") == expected
        assert drawn(tmp_path / "scattered", workers=2, first=6) == expected[6:]
    assert not caplog.records
    assert sorted(expected[:16]) == sorted([(f"a {number}", number) for number in range(8)] * 2)
    taken = drawn(tmp_path / "scattered", "number < 3 and width == 4")
    assert {caption for caption, _ in taken} == {"a 0", "a 1", "a 2"}


def test_an_index_keeps_where_the_pieces_of_unchanged_shards_lie(tmp_path: Path) -> None:
    members = photographs(4)
    for name in ("a", "b", "c"):  # the last sample of each lies side by side
        write_members(tmp_path / f"{name}.tar", arranged(members, "by kind") + photographs(5)[-3:])
    store = LocalStore(tmp_path)
    assert len(open_index(store).pieces) == 3 * 12
    write_members(tmp_path / "a.tar", arranged(photographs(2), "by kind"))
    index, anew = open_index(store), index_shards(store, store.shards())
    assert np.array_equal(index.records, anew.records)
    assert np.array_equal(index.pieces, anew.pieces)
    assert len(index.pieces) == 6 + 2 * 12
    samples = ShardDataset(tmp_path, ["png", "txt"])
    found = [(samples[place]["txt"], int(samples[place]["png"][0, 0, 0])) for place in range(len(samples))]
    assert found == [(f"a {number}", number) for number in [*range(2), *range(5), *range(5)]]


def test_an_extension_that_comes_again_begins_another_sample(tmp_path: Path) -> None:
    """Shards joined into one archive have keys twice; their samples are not mixed."""
    write_members(tmp_path / "a.tar", photographs(2) + photographs(2))
    write_members(
        tmp_path / "b.tar", [("0.png", png(1)), ("0.txt", b"x"), ("0.png", png(2)), ("0.txt", b"y")]
    )
    samples = ShardDataset(tmp_path, ["png", "txt"])
    found = [(samples[place]["txt"], int(samples[place]["png"][0, 0, 0])) for place in range(len(samples))]
    assert found == [("a 0", 0), ("a 1", 1), ("a 0", 0), ("a 1", 1), ("x", 1), ("y", 2)]


def test_a_piece_of_another_sample_is_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The shard has changed under an open index: the members keep their places, and have other names."""
    members = arranged(photographs(3), "by kind")
    write_members(tmp_path / "a.tar", members)
    samples = ShardDataset(tmp_path)
    captions = [name for name, _ in members if name.endswith("txt")]
    renamed = dict(zip(captions, captions[1:] + captions[:1], strict=True))
    write_members(tmp_path / "a.tar", [(renamed.get(name, name), content) for name, content in members])
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="lies where one of"):
        samples[0]


def test_pieces_that_are_not_there_are_told(tmp_path: Path) -> None:
    write_members(tmp_path / "a.tar", arranged(photographs(3), "by kind"))
    open_index(LocalStore(tmp_path))
    path = tmp_path / ".rmoe_index"
    content = bytearray(path.read_bytes())
    content[2 * 32 - 2] = 200  # the number of the first sample's pieces; the table has nine
    path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged at sample 0"):
        ShardDataset(tmp_path)[0]


@pytest.mark.parametrize("how", ["shards", "folders"])
def test_members_of_different_shards_or_folders_are_told(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    images, texts = [(f"{n}.png", png(n)) for n in range(3)], [(f"{n}.txt", b"a") for n in range(3)]
    if how == "shards":
        write_members(tmp_path / "a" / "0.tar", images)
        write_members(tmp_path / "a" / "1.tar", texts)
    else:
        both = [(f"images/{name}", content) for name, content in images]
        both += [(f"captions/{name}", content) for name, content in texts]
        write_members(tmp_path / "a" / "0.tar", both)
    with pytest.raises(UserError, match="lie in different shards or under different names"):
        TrainingDataset(tmp_path / "a", SampleFormat())
    write_members(tmp_path / "a" / "2.tar", [("9.png", png(9)), ("9.txt", b"a")])
    with caplog.at_level(logging.WARNING):
        assert len(TrainingDataset(tmp_path / "a", SampleFormat())) == 1
    assert any("some would be usable together" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("extension", ["tif", "GIF", "heic"])
def test_pictures_of_other_formats_are_told(
    tmp_path: Path, extension: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_members(tmp_path / "0.tar", [(f"0.{extension}", b"MM"), ("0.txt", b"a")])
    with pytest.raises(
        UserError, match=rf"their pictures are \*\.{extension.lower()}, and training takes png, jpg"
    ):
        TrainingDataset(tmp_path, SampleFormat())
    write_members(tmp_path / "1.tar", [("9.png", png(9)), ("9.txt", b"a")])
    with caplog.at_level(logging.WARNING):
        assert len(TrainingDataset(tmp_path, SampleFormat())) == 1
    assert "1 of the 2 samples" in caplog.text


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
