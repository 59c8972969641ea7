"""Files that are there whole or not at all, also after a crash, on a full disk, and where several processes make the same."""

import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rmoe_megatron.errors import UserError
from rmoe_megatron.files import claims
from rmoe_megatron.files.disk_errors import about, sentence

logger = logging.getLogger(__name__)


_looked_through: set[Path] = set()  # folders


def sync(path: Path) -> None:
    """Put a file's content, or a folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)


def write(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, put it on the disk and rename it."""
    data = content.encode() if isinstance(content, str) else content
    with writing(path, len(data)) as partial, partial.open("xb") as file:
        file.write(data)


@contextmanager
def writing(path: Path, size: int | None = None) -> Iterator[Path]:
    """Write a file under a name of this process's own, and give it its own when it is on the disk.

    Other processes may write the same file at the same time: one of them, whole, is there in the end.

    Args:
        size: its bytes, if they are known, for the message on a full disk.

    Yields:
        Where to write; nothing is there yet.
    """
    partial = own_partial(path)
    with about(path, partial, size):
        _remove_unfinished_files(path.parent)
        partial.unlink(missing_ok=True)  # a link there would lead elsewhere
        try:
            yield partial
            sync(partial)
            partial.rename(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        sync(path.parent)


def _remove_unfinished_files(folder: Path) -> None:
    """Remove what :func:`writing` left in a folder when the disk let nothing be removed, or its process was killed; once a process."""
    if folder in _looked_through:
        return
    _looked_through.add(folder)
    with suppress(OSError):
        for path in folder.glob(".*~*~*.partial"):
            if not path.is_dir() and not is_being_written(path):
                path.unlink(missing_ok=True)


def require_empty(folder: Path, name: str) -> None:
    """Check that ``folder`` can be made: it is not there or empty, and can be written.

    Raises:
        UserError: it holds something, is a file, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; choose another one or remove it first.")
    check_writable(folder, name)


def unfinished(final: Path) -> Path:
    """Return where the folder ``final`` is built by several processes that share the work."""
    return final.with_name(f".{final.name}.partial")


def own_partial(final: Path) -> Path:
    """Return where this process, and no other, builds ``final``."""
    return final.with_name(f".{final.name}~{socket.gethostname()}~{os.getpid()}.partial")


def is_being_written(partial: Path) -> bool:
    """Whether the process of an :func:`own_partial` may still be at it: it lives, or is of another host and wrote lately."""
    parts = partial.name.removesuffix(".partial").split("~")
    if len(parts) < 3 or claims.is_dead(*parts[-2:]):
        return False
    return (
        parts[-2] == socket.gethostname()
        or claims.now(partial.parent) - partial.lstat().st_mtime < claims.LONG_LEASE
    )


@contextmanager
def building(final: Path, replace: bool = False) -> Iterator[Path]:
    """Build the folder ``final`` under another name; it is there whole when the context ends, or not at all.

    What an earlier, unfinished attempt left is removed, and what this one has built if it raises before it is finished.

    Args:
        replace: ``final`` may hold something, which gives way at the end; else it may exist if it is empty.

    Raises:
        UserError: another process is building it, or it holds something.
    """
    partial = own_partial(final)
    with about(final, partial):
        final.parent.mkdir(parents=True, exist_ok=True)
        with claims.only_process(claim_of(final), f"{final} is being made"):
            if not replace:  # by whoever had the claim before
                require_empty(final, "The output")
            _remove_leftovers(final)
            try:
                partial.mkdir()
                yield partial
                for path in [*partial.rglob("*"), partial]:
                    sync(path)
                put_in_place(partial, final, replace)
            except BaseException:
                with suppress(OSError):
                    remove(partial)
                raise


@contextmanager
def filling(folder: Path) -> Iterator[None]:
    """Put files into a folder, which is made if it is not there, while no other process does.

    Raises:
        UserError: another process does; says which.
    """
    with about(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with claims.only_process(folder / ".claim", f"{folder} is being written"):
                yield
        except BaseException:
            with suppress(OSError):
                folder.rmdir()  # if nothing came of it
            raise


def claim_of(final: Path) -> Path:
    """Return the claim of the process that builds ``final``."""
    return final.with_name(f".{final.name}.claim")


def put_in_place(partial: Path, final: Path, replace: bool = False) -> None:
    """Give a folder that is on the disk its name.

    Args:
        replace: ``final`` may hold something, which gives way; else it may exist if it is empty.
    """
    replaced = own_partial(final.with_name(f"{final.name}.replaced"))
    if replace and final.exists():  # whatever fails here, one of the two stays whole
        remove(replaced)
        final.rename(replaced)
    try:
        partial.rename(final)  # over an empty folder, if there is one
        try:
            sync(final.parent)
        except BaseException:
            with suppress(OSError):
                final.rename(partial)
            raise
    except BaseException:
        if replaced.exists():
            with suppress(OSError):
                replaced.rename(final)
        raise
    if replaced.exists():
        try:
            remove(replaced)
        except OSError as error:
            logger.warning(
                "%s is there, but what it replaces stays beside it for now: %s", final, sentence(error)
            )


def _remove_leftovers(final: Path) -> None:
    """Remove what processes that had the claim before have left."""
    name = re.compile(rf"\.{re.escape(final.name)}(\.replaced)?~[^~]+~\d+\.partial")
    for path in final.parent.iterdir():
        if name.fullmatch(path.name):
            remove(path)


def remove(path: Path) -> None:
    """Remove a folder with all that it holds, or a file, or nothing if there is nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, onexc=_raise_with_whole_name)
    else:
        path.unlink(missing_ok=True)


def _raise_with_whole_name(function: Callable[..., Any], path: str, error: BaseException) -> None:
    """Raise what stops a removal; the system's own error names a file without its folder."""
    if isinstance(error, OSError):
        error.filename = path
    raise error


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
