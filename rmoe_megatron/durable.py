"""Files that are there whole or not at all, also after a crash."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rmoe_megatron.errors import UserError


def sync(path: Path) -> None:
    """Put a file's content, or a folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, put it on the disk and rename it."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)  # a link there would lead elsewhere
    with partial.open("xb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
    sync(partial)
    partial.rename(path)
    sync(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Write a file under a name of this process's own, and give it its own when it is on the disk.

    Other processes may write the same file at the same time: one of them, whole, is there in the end.

    Yields:
        Where to write.
    """
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        sync(partial)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def require_empty(folder: Path, name: str) -> None:
    """Check that ``folder`` can be made: it is not there or empty, and can be written.

    Raises:
        UserError: it holds something, is a file, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; choose another one or remove it first.")
    check_writable(folder, name)


def unfinished(final: Path) -> Path:
    """Return where the folder ``final`` is built."""
    return final.with_name(f".{final.name}.partial")


@contextmanager
def building(final: Path, replace: bool = False) -> Iterator[Path]:
    """Build the folder ``final`` under another name; it is there whole when the context ends, or not at all.

    What an earlier, unfinished attempt left is removed, and what this one has built if it raises before it is finished.

    Args:
        replace: ``final`` may hold something, which gives way at the end; else it may exist if it is empty.
    """
    partial = unfinished(final)
    remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        remove(partial)
        raise
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    put_in_place(partial, final, replace)


def put_in_place(partial: Path, final: Path, replace: bool = False) -> None:
    """Give a folder that is on the disk its name.

    Args:
        replace: ``final`` may hold something, which gives way; else it may exist if it is empty.
    """
    replaced = final.with_name(f".{final.name}.replaced.partial")
    if replace and final.exists():  # whatever fails here, one of the two stays whole
        remove(replaced)
        final.rename(replaced)
    elif final.is_dir():
        final.rmdir()
    partial.rename(final)
    sync(final.parent)
    remove(replaced)


def remove(path: Path) -> None:
    """Remove a folder with all that it holds, or a file, or nothing if there is nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_writable(folder: Path, name: str) -> None:
    """Check that ``folder`` can be created or written to.

    Raises:
        UserError: a parent is a file, or permission is missing.
    """
    existing = folder
    try:
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise UserError(
                f"{name} {folder} cannot be written: {existing} is a file; choose another folder."
            )
        # Permission bits say nothing to root or about read-only and virtual file systems; a file does.
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise UserError(
            f"{name} {folder} cannot be written: {error.strerror} in {existing}; choose another folder."
        ) from error
