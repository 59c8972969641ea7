"""The one rule for opening files that others may have made, and for writing among them.

A file is a regular one: no folder, pipe, socket or device, which could keep a command waiting or feed it for ever. A link in a
folder leads to a place in that folder, so that a prepared folder neither reads nor changes what lies outside of it; the cache of
the Hugging Face hub, whose snapshots are links to its blobs, counts as one folder. Who reads a whole file sets a bound on its size.
"""

import os
import stat
from collections.abc import Callable
from io import BufferedReader, TextIOWrapper
from pathlib import Path

from rmoe_megatron.errors import UserError

HUGE = 1 << 30  # bytes from which a file may not be mostly hole
DENSE = 64  # a huge file has at least one byte of data for so many bytes of its size
_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: Path, within: Path | None = None, follow: bool = False) -> BufferedReader:
    """Open a file to read its bytes.

    Args:
        within: the folder that a link must not lead out of; that of the file if it is None.
        follow: take a link wherever it leads, for a file that the user names.

    Raises:
        UserError: there is no file, it is no regular one, a link leads out of the folder, it may not be read, or it is a huge hole.
    """
    try:
        real = Path(os.path.realpath(path, strict=True))
        _check_kind(path, real.stat().st_mode)
        if not follow:
            _check_inside(path, real, within or path.parent)
        # Should the file be exchanged for a link or a pipe at this moment, opening it fails, or does not wait.
        descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{_shown(path)} cannot be read ({reason}); check the path.") from error
    file = os.fdopen(descriptor, "rb")
    try:
        _check_kind(path, os.fstat(descriptor).st_mode)
        _check_data(path, descriptor)
    except BaseException:
        file.close()
        raise
    return file


def check_regular(path: Path, within: Path | None = None, follow: bool = False) -> None:
    """Check that a library may be given ``path`` to open it; see :func:`open_regular`."""
    open_regular(path, within, follow).close()


def read_bytes(path: Path, max_bytes: int, within: Path | None = None, follow: bool = False) -> bytes:
    """Return a file's content; see :func:`open_regular`.

    Raises:
        UserError: it cannot be opened, or has more than ``max_bytes``.
    """
    with open_regular(path, within, follow) as file:
        size = os.fstat(file.fileno()).st_size  # 0 for some files that the system makes when they are read
        try:
            content = file.read(max_bytes + 1 if size == 0 else min(size, max_bytes) + 1)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); check the path.") from error
    if len(content) > max_bytes:
        raise UserError(f"{path} has more than {max_bytes} bytes, too many for what it should be.")
    return content


def open_to_append(path: Path) -> TextIOWrapper:
    """Open a text file to read it and to write at its end; it is made if it is missing, and never through a link.

    Raises:
        UserError: it is a link or no regular file, or may not be written.
    """
    try:
        if os.path.lexists(path):
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode):
                raise UserError(
                    f"{path} is a link, through which nothing is written; put a file there or remove it."
                )
            _check_kind(path, mode)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); check the path.") from error
    file = os.fdopen(descriptor, "a+", encoding="utf-8")
    try:
        _check_kind(path, os.fstat(descriptor).st_mode)
    except BaseException:
        file.close()
        raise
    return file


def check_subfolder(path: Path, within: Path) -> None:
    """Check that what is written below ``path``, or removed there, lies in the folder ``within``.

    Raises:
        UserError: it is a link that leads out of the folder.
    """
    if path.is_symlink():
        _check_inside(path, Path(os.path.realpath(path)), within)


def _check_kind(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
        raise UserError(f"{path} is no regular file but {kind}; put the file there that belongs there.")


def _check_inside(path: Path, real: Path, within: Path) -> None:
    folder = Path(os.path.realpath(within))
    if real.is_relative_to(folder):
        return
    snapshot = next((each for each in (folder, *folder.parents) if each.parent.name == "snapshots"), None)
    # A snapshot of the hub: CACHE/models--owner--name/snapshots/REVISION/..., which links to CACHE/models--owner--name/blobs.
    if snapshot is not None and real.parent == snapshot.parents[1] / "blobs":
        return
    raise UserError(
        f"{path} is a link out of its folder, to {real}; put there what it leads to (`cp -rL` copies a folder so)."
    )


def _check_data(path: Path, descriptor: int) -> None:
    """Refuse a huge file that is hardly more than a hole, which would take a command hours to read."""
    size = os.fstat(descriptor).st_size
    if size >= HUGE and not has_data(descriptor, size // DENSE):
        raise UserError(f"{path} has {size} bytes, but nearly all of them are a hole; fetch the file again.")


def has_data(descriptor: int, least: int) -> bool:
    """Whether a file holds at least so many bytes that are no hole; where a file system knows no holes, all are data."""
    found = position = 0
    while found < least:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
            position = os.lseek(descriptor, start, os.SEEK_HOLE)
        except OSError:  # no data behind the position
            break
        found += position - start
    os.lseek(descriptor, 0, os.SEEK_SET)
    return found >= least


def _shown(path: Path) -> str:
    return str(path) if str(path).isprintable() else repr(str(path))
