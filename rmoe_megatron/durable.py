"""Files that are there whole or not at all, also after a crash."""

import os
import tempfile
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
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(partial)
    partial.rename(path)
    sync(path.parent)


def publish(building: Path, final: Path) -> None:
    """Put a finished folder on the disk and rename it; ``final`` may exist if it is empty."""
    for path in [*building.rglob("*"), building]:
        sync(path)
    if final.is_dir():
        final.rmdir()
    building.rename(final)
    sync(final.parent)


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
