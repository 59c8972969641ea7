"""Folders that are there whole or not at all."""

import errno
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rmoe_megatron.errors import UserError, exit_code
from rmoe_megatron.files import atomic
from rmoe_megatron.files.disk_errors import sentence
from tests.support.commands import kill


def test_a_folder_is_there_when_it_is_finished(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "final"
    with atomic.building(final) as partial:
        (partial / "file").write_text("content")
        assert not final.exists()
    assert [path.name for path in final.parent.iterdir()] == ["final"]
    assert (final / "file").read_text() == "content"


def test_a_folder_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    final = tmp_path / "final"

    def interrupt() -> None:
        with atomic.building(final) as partial:
            (partial / "file").write_text("content")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file", "link", "pipe"])
def test_what_an_earlier_attempt_left_is_removed(tmp_path: Path, kind: str) -> None:
    final, left = tmp_path / "final", tmp_path / ".final~elsewhere.org~12.partial"
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("")
    if kind == "folder":
        (left / "inner").mkdir(parents=True)
    elif kind == "file":
        left.write_text("")
    elif kind == "link":
        left.symlink_to(kept)
    else:
        os.mkfifo(left)
    with atomic.building(final) as partial:
        assert list(partial.iterdir()) == []
        assert not partial.is_symlink()
    assert final.is_dir()
    assert (kept / "file").is_file()


def test_only_a_replacement_takes_the_place_of_something(tmp_path: Path) -> None:
    final = tmp_path / "final"
    final.mkdir()
    with atomic.building(final):  # an empty folder may be there
        pass
    (final / "old").write_text("")
    with pytest.raises(UserError, match="is not an empty folder"), atomic.building(final):
        pass
    assert (final / "old").is_file()
    with atomic.building(final, replace=True) as partial:
        (partial / "new").write_text("")
    assert [path.name for path in final.iterdir()] == ["new"]


def test_an_output_must_be_empty_and_writable(tmp_path: Path) -> None:
    atomic.require_empty(tmp_path / "new", "The output")
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="is not an empty folder"):
            atomic.require_empty(wrong, "The output")
    with pytest.raises(UserError, match="is a file"):
        atomic.require_empty(tmp_path / "file" / "new", "The output")


def test_a_replacement_that_fails_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "final"
    final.mkdir()
    (final / "old").write_text("")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if target == final and ".replaced~" not in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    def build() -> None:
        with atomic.building(final, replace=True) as partial:
            (partial / "new").write_text("")

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        build()
    monkeypatch.undo()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["final", "final/old"]
    build()
    assert [path.name for path in final.iterdir()] == ["new"]


def start_building(final: Path, seconds: float = 60) -> subprocess.Popen[str]:
    """Start a process that builds a folder and takes its time."""
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom rmoe_megatron.files import atomic\n"
        "with atomic.building(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'file').write_text('theirs'); print('at it', flush=True); time.sleep(float(sys.argv[2]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(final), str(seconds)],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "at it\n"
    return process


def test_one_process_builds_and_the_second_says_who(tmp_path: Path) -> None:
    final = tmp_path / "final"
    process = start_building(final)
    try:
        message = (
            f"{final} is being made by process {process.pid} on {socket.gethostname()}; wait for its end"
        )
        with pytest.raises(UserError, match=re.escape(message)), atomic.building(final):
            pass
        assert not final.exists()
    finally:
        kill(process)
    with atomic.building(final) as partial:  # the claim of a dead process is void, and what it left goes
        (partial / "file").write_text("mine")
    assert (final / "file").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [final]


def test_what_another_process_has_made_meanwhile_is_kept(tmp_path: Path) -> None:
    final = tmp_path / "final"
    atomic.require_empty(final, "The output")
    assert start_building(final, seconds=0).wait(timeout=60) == 0
    with pytest.raises(UserError, match="is not an empty folder"), atomic.building(final):
        pass
    assert (final / "file").read_text() == "theirs"


def test_a_neighbour_with_a_longer_name_is_left_alone(tmp_path: Path) -> None:
    process = start_building(tmp_path / "final.more")
    try:
        with atomic.building(tmp_path / "final"):
            pass
        assert (atomic.own_partial(tmp_path / "final.more").parent).is_dir()
        (left,) = tmp_path.glob(".final.more~*.partial")
        assert (left / "file").read_text() == "theirs"
    finally:
        kill(process)


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EIO", "EROFS", "ESTALE", "EACCES", "ENAMETOOLONG"])
def test_what_the_system_refuses_is_one_sentence(tmp_path: Path, name: str) -> None:
    number = getattr(errno, name)

    def write(partial: Path) -> None:
        partial.write_text("a part")
        raise OSError(number, os.strerror(number))  # as writing does, without a name

    target = tmp_path / "inner" / "file"
    target.parent.mkdir()
    with pytest.raises(OSError) as caught, atomic.writing(target, 12345) as partial:  # noqa: PT011  # its number follows
        write(partial)
    assert caught.value.errno == number
    assert list(target.parent.iterdir()) == []
    message = sentence(caught.value)
    assert message.startswith(
        f"{target} cannot be written, read or removed ({os.strerror(number)}): {target.parent} lies on"
    )
    assert ("bytes free, 12345 bytes were to be written" in message) == (name in ("ENOSPC", "EDQUOT"))
    assert "\n" not in message
    assert exit_code(caught.value) == 2


def test_an_error_about_another_file_keeps_its_name(tmp_path: Path) -> None:
    def build() -> None:
        with atomic.building(tmp_path / "final"):
            (tmp_path / "missing").read_text()

    with pytest.raises(FileNotFoundError) as caught:
        build()
    assert caught.value.filename == str(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_removed_has_its_whole_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    file = tmp_path / "folder" / "inner" / "file"
    file.write_text("")

    def fail(path: str, dir_fd: int | None = None) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    monkeypatch.setattr(os, "unlink", fail)
    with pytest.raises(OSError, match="Input/output error") as caught:
        atomic.remove(tmp_path / "folder")
    assert caught.value.filename == str(file)
