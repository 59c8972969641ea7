"""What the system says where a file cannot be written, read or removed, as one sentence: which one, which disk, how much is free."""

import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rmoe_megatron.errors import RunError, UserError

logger = logging.getLogger(__name__)

_OF_RUST = re.compile(r"\(os error (\d{1,4})\)")
FULL = {errno.ENOSPC, errno.EDQUOT}
_ADVICE = {
    errno.EDQUOT: "your quota there is used up; remove something or ask for more",
    errno.ENOSPC: "make room there",
    errno.EROFS: "it may only be read; have it mounted for writing, or choose another folder",
    errno.EACCES: "you may not do that there; choose another folder, or have its permissions changed",
    errno.EPERM: "you may not do that there; choose another folder, or have its permissions changed",
    errno.EIO: "the disk, or the server behind it, has a fault; choose another one, or have it looked after",
    errno.ESTALE: "its server has lost it; try again, or have the file system mounted anew",
    errno.ENAMETOOLONG: "choose a shorter name",
}


@contextmanager
def about(path: Path, partial: Path | None = None, wanted: int | None = None) -> Iterator[None]:
    """Give an error of the system that names no file, as those of writing do, the name of ``path``.

    What libraries in Rust (safetensors, tokenizers) say of the system in the text of an error of their own is made one of the system's.

    Args:
        partial: under which name ``path`` is being made; errors that name it, or what is in it, are about ``path``.
        wanted: bytes that are to be written, for :func:`sentence`.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and _is_about(error, partial):
            error.filename, error.filename2 = str(path), None
            error.wanted = getattr(error, "wanted", wanted)  # type: ignore[attr-defined]
        raise
    except Exception as error:
        number = None if isinstance(error, UserError) else _OF_RUST.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


@contextmanager
def warned(what: str) -> Iterator[None]:
    """Warn of an error of the system and go on: ``what`` can do without, or is written anew later."""
    try:
        yield
    except (OSError, UserError) as error:
        logger.warning("%s: %s The run goes on without.", what, message_of(error))


def _is_about(error: OSError, partial: Path | None) -> bool:
    if error.filename is None:
        return True
    return partial is not None and Path(os.fsdecode(error.filename)).is_relative_to(partial)


def message_of(error: BaseException) -> str | None:
    """Return what a user reads of an error, one sentence; None where it is none of ours or of the system, and has a traceback."""
    if isinstance(error, UserError | RunError):
        return str(error)
    return sentence(error) if isinstance(error, OSError) and error.errno is not None else None


def sentence(error: OSError) -> str:
    """Return what went wrong, where and what to do.

    Args:
        error: with an ``errno``; see :func:`about`.
    """
    number, said = error.errno or 0, error.strerror or str(error)
    if error.filename is None or isinstance(error.filename, int):
        return (
            f"The system refused an operation on a file ({said}); {_ADVICE.get(number, 'see what it was')}."
        )
    path = Path(os.fsdecode(error.filename2 or error.filename))
    return (
        f"{path} cannot be written, read or removed ({said}): {_place(path, number, error)}{_advice(number)}."
    )


def _advice(number: int) -> str:
    return _ADVICE.get(number, "check the path")


def _place(path: Path, number: int, error: OSError) -> str:
    """Return which disk it is, and on a full one how much is free, as the beginning of a clause."""
    folder = path.parent
    try:
        while not folder.exists():
            folder = folder.parent
        mount = folder.resolve()
        while not mount.is_mount():
            mount = mount.parent
        place = f"{folder} lies on the disk at {mount}"
        if number in FULL:
            wanted = getattr(error, "wanted", None)
            of = f", {wanted} bytes were to be written" if wanted is not None else ""
            place += f", which has {shutil.disk_usage(folder).free} bytes free{of}"
    except (OSError, ValueError):
        return ""
    return f"{place}; "
