"""Only regular files are opened, no link leads out of its folder, nothing is written through a link, and sizes have bounds."""

import os
import socket
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic
from rmoe_megatron.files.regular import (
    HUGE,
    check_regular,
    check_subfolder,
    open_regular,
    open_to_append,
    read_bytes,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``inside/a`` and ``inside/sub/b`` are files, ``outside`` is one beside the folder."""
    (tmp_path / "inside" / "sub").mkdir(parents=True)
    for name in ("inside/a", "inside/sub/b", "outside"):
        (tmp_path / name).write_text(name)
    return tmp_path


def strange(folder: Path) -> dict[str, Path]:
    """What is no regular file, by what the message calls it."""
    os.mkfifo(folder / "pipe")
    (folder / "fold").mkdir()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(folder / "socket"))
    for target in ("/dev/zero", "/dev/null"):
        (folder / target.rpartition("/")[2]).symlink_to(target)
    return {
        "a pipe": folder / "pipe",
        "a folder": folder / "fold",
        "a socket": folder / "socket",
        "a device": folder / "zero",
    }


def test_what_is_no_regular_file_is_neither_read_nor_written(folder: Path) -> None:
    for kind, path in strange(folder / "inside").items():
        for follow in (False, True):
            with pytest.raises(UserError, match=f"is no regular file but {kind}"):
                open_regular(path, follow=follow)
        with pytest.raises(UserError, match="is no regular file|is a link"):
            open_to_append(path)
    for path in (folder / "missing", folder / "nul\0byte", folder / "outside" / "x", Path()):
        with pytest.raises(UserError, match="cannot be read|is no regular file"):
            open_regular(path)


def test_a_link_stays_in_its_folder(folder: Path) -> None:
    inside = folder / "inside"
    links = {
        "up": "../outside",
        "absolute": str(folder / "outside"),
        "deep": "sub/../../outside",
        "two": "up",
    }
    for name, target in links.items():
        (inside / name).symlink_to(target)
        with pytest.raises(UserError, match="is a link out of its folder, to .*/outside"):
            check_regular(inside / name)
        assert open_regular(inside / name, follow=True).read() == b"outside"
    (inside / "sub" / "near").symlink_to("../a")
    with pytest.raises(UserError, match="link out of its folder"):
        check_regular(inside / "sub" / "near")
    assert open_regular(inside / "sub" / "near", within=inside).read() == b"inside/a"
    (folder / "beside").symlink_to("inside")  # the folder itself may be named by a link
    assert open_regular(folder / "beside" / "a").read() == b"inside/a"
    (folder / "inside-too").write_text("of a name that begins alike")
    (inside / "alike").symlink_to("../inside-too")
    with pytest.raises(UserError, match="link out of its folder"):
        check_regular(inside / "alike")


def test_a_snapshot_of_the_hub_is_links_to_its_blobs(folder: Path) -> None:
    cache = folder / "models--owner--name"
    snapshot = cache / "snapshots" / "0123" / "vae"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "abcd").write_text("weights")
    (snapshot / "w").symlink_to("../../../blobs/abcd")
    assert open_regular(snapshot / "w").read() == b"weights"
    (snapshot / "other").symlink_to("../../../../outside")
    (cache / "blobs" / "ef").symlink_to(folder / "outside")
    (snapshot / "blob").symlink_to("../../../blobs/ef")
    for name in ("other", "blob"):
        with pytest.raises(UserError, match="link out of its folder"):
            check_regular(snapshot / name)


def test_nothing_is_written_through_a_link(folder: Path) -> None:
    inside = folder / "inside"
    for name, target in (("to file", "../outside"), ("dangling", "../nowhere")):
        (inside / name).symlink_to(target)
        with pytest.raises(UserError, match="is a link, through which nothing is written"):
            open_to_append(inside / name)
        (inside / "c.partial").unlink(missing_ok=True)
        (inside / "c.partial").symlink_to(target)
        atomic.write(inside / "c", "new")
        assert (inside / "c").read_text() == "new"
    assert (folder / "outside").read_text() == "outside"
    assert not (folder / "nowhere").exists()
    with open_to_append(inside / "a") as file:
        file.write(" more")
    with open_to_append(inside / "made") as file:
        file.write("text")
    assert (inside / "a").read_text() == "inside/a more"
    assert (inside / "made").read_text() == "text"
    (inside / "out").symlink_to("..")
    (inside / "in").symlink_to("sub")
    for name in ("sub", "in", "not there"):
        check_subfolder(inside / name, inside)
    with pytest.raises(UserError, match="link out of its folder"):
        check_subfolder(inside / "out", inside)


def test_a_huge_hole_is_refused_and_a_large_file_read(folder: Path) -> None:
    hole = folder / "hole"
    with hole.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="has 1099511627776 bytes, but nearly all of them are a hole"):
        check_regular(hole)
    with hole.open("r+b") as file:
        file.write(b"x" * (1 << 20))
    with pytest.raises(UserError, match="nearly all of them are a hole"):
        check_regular(hole)
    os.truncate(hole, HUGE - 1)
    with open_regular(hole) as file:
        assert file.read(3) == b"xxx"


@given(size=st.integers(0, 300), limit=st.integers(0, 300))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_is_read_up_to_its_bound(size: int, limit: int, folder: Path) -> None:
    content = bytes(number % 256 for number in range(size))
    (folder / "inside" / "bytes").write_bytes(content)
    if size <= limit:
        assert read_bytes(folder / "inside" / "bytes", limit) == content
    else:
        with pytest.raises(UserError, match=f"more than {limit} bytes"):
            read_bytes(folder / "inside" / "bytes", limit)
