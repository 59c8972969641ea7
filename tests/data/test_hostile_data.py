"""Data that mean harm: pipes, devices, links out of the folder, holes and captions of any size are left out by name, or refused."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rmoe_megatron.data.packing.pack import pack
from rmoe_megatron.data.shards.archive import scan
from rmoe_megatron.data.shards.dataset import ShardDataset
from rmoe_megatron.data.storage.store import LocalStore
from rmoe_megatron.errors import UserError
from tests.data.test_shards import png
from tests.support.runs import write_members

CAPTION = b"a cat"


def left_out(out: Path) -> dict[str, str]:
    lines = (out / "left_out.jsonl").read_text().splitlines()
    return {each["name"]: each["reason"] for each in map(json.loads, lines)}


def test_a_folder_of_strange_files_is_packed_without_them(tmp_path: Path) -> None:
    source, secret = tmp_path / "source", tmp_path / "secret.txt"
    source.mkdir()
    secret.write_text("hush-hush")
    for name in "abcdefgh":
        (source / f"{name}.png").write_bytes(png(1))
        (source / f"{name}.txt").write_bytes(CAPTION)
    reasons = {"a.png": "but a pipe", "b.png": "but a pipe", "c.png": "but a device", "d.png": "link out of its folder",
               "e.png": "link out of its folder", "f.png": "has more than 1048576 bytes"}  # fmt: skip
    for name in ("a.png", "b.txt", "c.txt", "d.txt", "e.png"):
        (source / name).unlink()
    os.mkfifo(source / "a.png")
    os.mkfifo(source / "b.txt")
    (source / "c.txt").symlink_to("/dev/zero")
    (source / "d.txt").symlink_to(secret)
    (tmp_path / "picture.png").write_bytes(png(1))
    (source / "e.png").symlink_to(tmp_path / "picture.png")
    with (source / "f.txt").open("wb") as file:
        file.truncate(300 << 20)
    (source / "i.png").symlink_to("g.png")  # a link inside of the folder
    (source / "i.txt").write_bytes(CAPTION)
    assert pack(source, tmp_path / "out").samples == 3
    assert left_out(tmp_path / "out").keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in left_out(tmp_path / "out")[name]
    assert b"hush-hush" not in b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_a_table_that_names_strange_files_is_packed_without_them(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "good.png").write_bytes(png(1))
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(1 << 40)
    images = [
        "pipe.png",
        "/dev/zero",
        "/dev/stdin",
        str(tmp_path),
        "huge.png",
        "missing.png",
        "good.png",
        "good.png",
    ]
    rows = [{"image": image, "caption": "a cat"} for image in images]
    rows[-1]["caption"] = "a" * (2 << 20)
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert pack(tmp_path / "table.jsonl", tmp_path / "out").samples == 1
    reasons = list(left_out(tmp_path / "out").values())
    words = [
        "a pipe",
        "a device",
        "no regular file|cannot be read",
        "a folder",
        "a hole",
        "cannot be read",
        "its caption has more",
    ]
    assert len(reasons) == len(words)
    for reason, word in zip(reasons, words, strict=True):
        assert any(each in reason for each in word.split("|")), reason


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_a_table_is_a_regular_file(tmp_path: Path, suffix: str) -> None:
    table = tmp_path / f"table{suffix}"
    os.mkfifo(table)
    with pytest.raises(UserError, match="neither a folder nor a table"):
        pack(table, tmp_path / "out")
    table.unlink()
    with table.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="nearly all of them are a hole"):
        pack(table, tmp_path / "out")


@pytest.mark.parametrize(("member", "size"), [("txt", 30 << 20), ("json", 1 << 25), ("cls", 1000)])
def test_a_member_that_is_text_has_a_bound(tmp_path: Path, member: str, size: int) -> None:
    write_members(
        tmp_path / "0.tar",
        [("0.png", png(1)), (f"0.{member}", b" " * size), ("1.png", png(2)), (f"1.{member}", b"1")],
    )
    dataset = ShardDataset(tmp_path)
    with pytest.raises(ValueError, match=f"{member}: {size} bytes, more than the"):
        dataset.decoded(0)
    assert str(dataset.decoded(1)[member]) == "1"


def test_a_shard_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0.tar")
    with pytest.raises(UserError, match="no regular file"):
        LocalStore(tmp_path).shards()


def keys(path: Path) -> tuple[list[str], list[str]]:
    """The samples that a scan finds, and the damage."""
    damage: list[str] = []
    with path.open("rb") as file:
        return [sample.key for sample in scan(file, damage)], damage


def test_holes_of_any_size_are_passed_over(tmp_path: Path) -> None:
    """A file of 1 TB would be scanned for hours if its zeros were read."""
    size = 1 << 40
    path = tmp_path / "0.tar"
    with path.open("wb") as file:
        file.truncate(size)
    assert keys(path)[0] == []
    write_members(tmp_path / "small.tar", [("a.png", png(1)), ("b.png", png(2))])
    content = (tmp_path / "small.tar").read_bytes()
    with path.open("r+b") as file:
        file.write(content)
    assert keys(path) == (["a", "b"], [])
    with path.open("r+b") as file:
        file.seek(size // 2)
        write_members(tmp_path / "small.tar", [("c.png", png(3))])
        file.write((tmp_path / "small.tar").read_bytes())
    found, damage = keys(path)
    assert found == ["a", "b", "c"]
    assert damage == [f"no members in bytes {end_of(content)} to {size // 2}"]


def end_of(content: bytes) -> int:
    """Where the members of a small archive end and its zeros begin, in blocks."""
    return -(-len(content.rstrip(b"\0")) // 512) * 512


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=6), st.integers(0, 600))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_members_between_zeros_are_found(tmp_path: Path, pieces: list[tuple[bool, int]], rest: int) -> None:
    """Archives one behind the other, with any number of blocks of zeros before, between and behind them."""
    path, expected = tmp_path / "0.tar", []
    with path.open("wb") as file:
        for number, (has_member, zeros) in enumerate(pieces):
            file.write(bytes(512 * zeros))
            if has_member:
                write_members(tmp_path / "small.tar", [(f"{number}.png", b"x" * 700)])
                content = (tmp_path / "small.tar").read_bytes()
                file.write(content[: end_of(content)])
                expected.append(str(number))
        file.write(bytes(rest))
    assert keys(path)[0] == expected
