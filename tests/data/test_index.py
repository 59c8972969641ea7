"""The index of a folder: what it says of samples, how it is kept up to date, and that a billion samples cost nothing."""

import io
import json
import logging
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rmoe_megatron.config.sample_filter import SampleFilter
from rmoe_megatron.data.shards import build_index as indexing
from rmoe_megatron.data.shards import index as index_module
from rmoe_megatron.data.shards.build_index import build_index, index_shards, open_index
from rmoe_megatron.data.shards.dataset import ShardDataset
from rmoe_megatron.data.shards.index import (
    BLOCK,
    INDEX,
    MAX_KINDS,
    RECORD,
    Index,
    IndexedShard,
    IndexWriter,
    Selection,
)
from rmoe_megatron.data.storage.store import LocalStore
from rmoe_megatron.errors import UserError
from tests.support.runs import array, write_shard


def picture(width: int, height: int, file_format: str = "jpeg") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, format=file_format)
    return buffer.getvalue()


def write_pictures(path: Path, sizes: list[tuple[int, int]]) -> None:
    write_shard(path, [{"jpg": picture(*size), "txt": b"x" * size[0]} for size in sizes])


def sizes(index: Index) -> list[tuple[int, int]]:
    return [(int(record["width"]), int(record["height"])) for record in index.records]


def test_it_says_where_samples_are_and_how_large(tmp_path: Path) -> None:
    write_pictures(tmp_path / "a.tar", [(3, 5), (7, 2)])
    latents = {"latents.npy": array(np.zeros((4, 6, 9))), "json": b"{}"}
    write_shard(tmp_path / "b.tar", [{"png": picture(4, 4, "png")}, latents, {"jpg": b"none", "txt": b""}])
    index = open_index(LocalStore(tmp_path))
    assert sizes(index) == [(3, 5), (7, 2), (4, 4), (9, 6), (0, 0)]
    assert index.records["shard"].tolist() == [0, 0, 1, 1, 1]
    assert index.records["caption"].tolist() == [3, 7, 0, 0, 0]
    for record in index.records:
        shard = tmp_path / index.shards[record["shard"]].name
        with tarfile.open(shard) as tar:
            own = [member for member in tar if member.offset >= record["offset"]]
            own = own[: len(index.kinds[record["kind"]].members)]
        assert own[0].offset == record["offset"]
        assert own[-1].offset_data + own[-1].size == record["offset"] + record["size"]
        assert [member.name.split(".", 1)[1] for member in own] == index.kinds[record["kind"]].members
    assert {tuple(kind.members): kind.samples for kind in index.kinds} == {
        ("jpg", "txt"): 3, ("png",): 1, ("latents.npy", "json"): 1,
    }  # fmt: skip


@pytest.mark.parametrize("file_format", ["jpeg", "webp", "avif"])
def test_sizes_are_those_of_the_upright_picture(tmp_path: Path, file_format: str) -> None:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 8
    Image.new("RGB", (30, 10)).save(buffer, format=file_format, exif=exif)
    write_shard(tmp_path / "a.tar", [{"jpg": buffer.getvalue()}])
    assert sizes(open_index(LocalStore(tmp_path))) == [(10, 30)]
    assert ShardDataset(tmp_path)[0]["jpg"].shape == (3, 30, 10)


def test_upper_case_extensions_are_those_in_lower_case(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [{"JPG": picture(3, 5), "Txt": b"x"}])
    assert sizes(open_index(LocalStore(tmp_path))) == [(3, 5)]
    assert ShardDataset(tmp_path, ["jpg", "txt"])[0]["txt"] == "x"


def test_only_shards_that_changed_are_scanned_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        write_pictures(tmp_path / f"{name}.tar", [(ord(name), 1), (ord(name), 2)])
    scanned: list[str] = []
    scan = indexing.scan_shard
    monkeypatch.setattr(
        indexing,
        "scan_shard",
        lambda store, sample_filter, shard: scanned.append(shard.name) or scan(store, sample_filter, shard),
    )
    open_index(LocalStore(tmp_path))
    assert scanned == ["a.tar", "b.tar", "c.tar"]
    scanned.clear()
    before = (tmp_path / INDEX).stat().st_ino
    open_index(LocalStore(tmp_path))
    assert not scanned
    assert (tmp_path / INDEX).stat().st_ino == before
    (tmp_path / "a.tar").unlink()
    write_pictures(tmp_path / "b.tar", [(1, 1)])
    write_shard(tmp_path / "aa.tar", [{"png": picture(2, 2, "png")}])
    index = open_index(LocalStore(tmp_path))
    assert scanned == ["aa.tar", "b.tar"]
    anew = index_shards(LocalStore(tmp_path), LocalStore(tmp_path).shards())
    assert sizes(index) == sizes(anew) == [(2, 2), (1, 1), (99, 1), (99, 2)]
    assert [index.kinds[kind].members for kind in index.records["kind"]] == [
        anew.kinds[kind].members for kind in anew.records["kind"]
    ]
    assert index.shards == anew.shards
    assert index.block_counts.sum() == 4


def test_processes_make_the_same_index(tmp_path: Path) -> None:
    for number in range(5):
        kind = {"txt": b"x"} if number % 2 else {}
        write_shard(tmp_path / f"{number}.tar", [{"png": picture(number + 1, 2, "png"), **kind}] * 3)
    build_index(LocalStore(tmp_path))
    alone = (tmp_path / INDEX).read_bytes()
    (tmp_path / INDEX).unlink()
    told: list[tuple[int, int]] = []
    build_index(LocalStore(tmp_path), processes=2, progress=lambda *done: told.append(done))
    assert (tmp_path / INDEX).read_bytes() == alone
    assert told == [(done, 5) for done in range(1, 6)]


@pytest.mark.parametrize("damage", ["empty", "other", "cut", "longer", "json"])
def test_a_damaged_index_is_made_anew(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    write_pictures(tmp_path / "a.tar", [(3, 5)] * 3)
    open_index(LocalStore(tmp_path))
    path = tmp_path / INDEX
    sound = path.read_bytes()
    path.write_bytes({
        "empty": b"", "other": b"x" * len(sound), "cut": sound[:-1], "longer": sound[:40] + bytes(32) + sound[40:],
        "json": sound.replace(b'"samples": 3', b'"samples": -'),
    }[damage])  # fmt: skip
    with caplog.at_level(logging.WARNING):
        assert sizes(open_index(LocalStore(tmp_path))) == [(3, 5)] * 3
    assert "it is made anew" in caplog.text
    assert path.read_bytes() == sound


@pytest.mark.parametrize("field", ["shard", "kind"])
@pytest.mark.parametrize("extensions", [None, ["txt"]])
def test_a_damaged_record_is_told(tmp_path: Path, field: str, extensions: list[str] | None) -> None:
    write_shard(tmp_path / "a.tar", [{"jpg": picture(3, 5), "txt": b"x"}] * 3 + [{"jpg": picture(3, 5)}])
    open_index(LocalStore(tmp_path))
    content = bytearray((tmp_path / INDEX).read_bytes())
    place = RECORD.itemsize * 2 + RECORD.fields[field][1]  # of the second sample, behind the magic word
    content[place : place + 2] = b"\xff\x7f"
    (tmp_path / INDEX).write_bytes(content)
    dataset = ShardDataset(tmp_path, extensions)
    with pytest.raises(UserError, match=r"is damaged .* remove its \.rmoe_index"):
        [dataset[index] for index in range(len(dataset))]


def test_a_shard_that_changes_under_an_index_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_pictures(tmp_path / "a.tar", [(3, 5)] * 3)
    dataset = ShardDataset(tmp_path)
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(b"\xff" * 600 + content[600:])
    with caplog.at_level(logging.WARNING):
        assert dataset[0]["__key__"] == "000001"
    assert "Sample 0 of" in caplog.text


def test_a_folder_that_cannot_be_written_has_its_index_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = tmp_path / "data"
    write_pictures(data / "a.tar", [(3, 5)])
    writing = indexing.atomic.writing

    def refuse(path: Path):  # type: ignore[no-untyped-def]  # root may write everywhere
        if data in path.parents or (tmp_path / "full") in path.parents:
            raise OSError(30, "Read-only file system")
        return writing(path)

    monkeypatch.setattr(indexing.atomic, "writing", refuse)
    open_index(LocalStore(data))
    assert [path.name for path in data.iterdir()] == ["a.tar"]
    (path,) = (tmp_path / "cache" / "rmoe_megatron" / "index").iterdir()
    made = path.stat().st_ino
    open_index(LocalStore(data))
    assert path.stat().st_ino == made
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "full"))
    with caplog.at_level(logging.WARNING):
        assert sizes(open_index(LocalStore(data))) == [(3, 5)]
    assert "cannot be written" in caplog.text


def write_described(folder: Path) -> None:
    described = [
        {"aesthetic": 6.0}, {"aesthetic": 4.0}, {"aesthetic": "high"}, {}, {"aesthetic": 7.5, "width": 99999},
    ]  # fmt: skip
    for shard in range(3):
        samples = [
            {"jpg": picture(10 * (shard + 1), 10), "txt": b"x", "json": json.dumps(each).encode()}
            for each in described
        ]
        write_shard(folder / f"{shard}.tar", [*samples, {"jpg": picture(90, 9), "txt": b"xyz"}])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("aesthetic > 5", [0, 4, 6, 10, 12, 16]),
        ("width >= 20 and aesthetic > 5", [6, 10, 12, 16]),  # of the picture, whatever the JSON says
        ("aspect_ratio > 5", [5, 11, 17]),
        ("caption_bytes == 3 or aesthetic < 5", [1, 5, 7, 11, 13, 17]),
    ],
)
def test_a_filter_leaves_samples_out(
    tmp_path: Path, text: str, expected: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    write_described(tmp_path)
    with caplog.at_level(logging.WARNING):
        dataset = ShardDataset(tmp_path, ["jpg", "txt"], sample_filter=SampleFilter(text))
    places = [
        6 * int(Path(dataset.shard(index)).stem) + int(dataset.name(index)) for index in range(len(dataset))
    ]
    assert places == expected
    assert not caplog.records
    assert len(ShardDataset(tmp_path)) == 18  # another index


@pytest.mark.parametrize("text", ["not (watermrk > 0.8)", 'not (aesthetic == "7")', "width > 0"])
def test_a_filter_that_always_holds_is_told(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A name that no sample has, a value of another type, a condition that all of them meet."""
    write_described(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert len(ShardDataset(tmp_path, ["jpg", "txt"], sample_filter=SampleFilter(text))) == 18
    (record,) = caplog.records
    assert f"data.filter {text} takes all 18 samples in {tmp_path}" in record.getMessage()


def test_every_filter_has_an_index_that_is_kept(tmp_path: Path) -> None:
    write_described(tmp_path)
    found = {}
    for text in ("aesthetic > 5", "aesthetic > 7", None):
        made = SampleFilter(text) if text else None
        build_index(LocalStore(tmp_path), made, processes=2)
        (path,) = [
            path for path in LocalStore(tmp_path).index_paths(indexing.index_name(made)) if path.is_file()
        ]
        found[text] = path, path.stat().st_ino
        open_index(LocalStore(tmp_path), made)
        assert path.stat().st_ino == found[text][1]
    assert len({path for path, _ in found.values()}) == 3
    first, second = found["aesthetic > 5"][0], found["aesthetic > 7"][0]
    first.write_bytes(second.read_bytes())  # an index of another filter is not taken for this one's
    assert len(ShardDataset(tmp_path, sample_filter=SampleFilter("aesthetic > 5"))) == 6
    with pytest.raises(UserError, match="takes none of the 18 samples"):
        ShardDataset(tmp_path, sample_filter=SampleFilter("aesthetic > 8"))


@settings(deadline=None)
@given(
    kinds=st.lists(st.integers(0, 2), min_size=1, max_size=300),
    wanted=st.sets(st.integers(0, 2), min_size=1),
    block=st.integers(1, 50),
)
def test_a_selection_is_the_list_of_what_is_wanted(kinds: list[int], wanted: set[int], block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "BLOCK", block)
        content = io.BytesIO()
        writer = IndexWriter(content)
        records = np.zeros(len(kinds), RECORD)
        records["kind"] = kinds
        writer.add(IndexedShard("a.tar", 1, 1, len(kinds), ""), records, [("a",), ("b",), ("c",)])
        writer.finish()
        index = index_module.parse_index(np.frombuffer(content.getbuffer(), np.uint8), Path("folder"))
        names = {"abc"[number] for number in wanted}
        selection = Selection.of_kinds(index, lambda members: members <= names)
        expected = [place for place, kind in enumerate(kinds) if kind in wanted]
        assert len(selection) == len(expected)
        assert [selection[number] for number in range(len(selection))] == expected


def test_too_many_kinds_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [{f"{number}.txt": b"x"} for number in range(MAX_KINDS + 1)])
    with pytest.raises(UserError, match="different sets of members"):
        open_index(LocalStore(tmp_path))


# Opens an index of a billion samples, of which every third block lacks a caption, and draws from it.
BILLION = """
import sys
from pathlib import Path
from rmoe_megatron.data.shards.index import Selection, read_index
from rmoe_megatron.data.order import GlobalOrder

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4  # KiB

before = resident()
index = read_index(Path(sys.argv[1]), Path("folder"))
selection = Selection.of_kinds(index, lambda members: "txt" in members)
order = GlobalOrder(len(selection), shuffle=True, seed=0)
drawn = [selection[order[draw]] for draw in range(10**11, 10**11 + 2000)]
assert len(set(drawn)) == 2000 and all(index.kinds[index.records["kind"][place]].members == ["jpg", "txt"] for place in drawn)
print(len(index), len(selection), resident() - before)
"""


def test_a_billion_samples_take_no_memory(tmp_path: Path) -> None:
    """The file has holes in the place of nearly all its records: 32 GB that take no disk."""
    blocks = 10**9 // BLOCK
    path = tmp_path / "index"
    with path.open("wb") as file:
        writer = IndexWriter(file)
        empty = np.zeros(0, RECORD)
        writer.add(IndexedShard("000000.tar", 1, 1, 0, ""), empty, [])
        writer.kinds = {("jpg", "txt"): 0, ("jpg",): 1}
        writer.shards[0] = IndexedShard("000000.tar", 1, 1, blocks * BLOCK, "")
        lacking = np.zeros(BLOCK, RECORD)
        lacking["kind"] = 1
        for block in range(blocks):
            is_lacking = block % 30_000 == 0
            if is_lacking:
                file.write(lacking.data)
            else:
                file.seek(lacking.nbytes, os.SEEK_CUR)
            writer.block_counts.append(np.array([0, BLOCK] if is_lacking else [BLOCK, 0], dtype="<u2"))
            writer.samples[int(is_lacking)] += BLOCK
        writer.finish()
    assert path.stat().st_blocks * 512 < 100e6
    process = subprocess.run(
        [sys.executable, "-c", BILLION, str(path)], capture_output=True, text=True, timeout=100
    )
    assert process.returncode == 0, process.stderr
    samples, selected, kilobytes = map(int, process.stdout.split())
    assert samples == blocks * BLOCK
    assert selected == samples - -(-blocks // 30_000) * BLOCK
    print(f"{samples} samples: {kilobytes} KiB more are resident after 2000 draws")  # seen with -s
    assert 0 < kilobytes < 100_000
