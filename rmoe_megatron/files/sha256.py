"""The SHA-256 of a large file, which is worked out once."""

import hashlib
import os
import time
from pathlib import Path

from rmoe_megatron.files import atomic
from rmoe_megatron.files.regular import open_regular, read_bytes

SETTLED = 2.0  # seconds: the coarsest clock of a file system's times


def sha256_of(file: Path) -> str:
    """Return a file's SHA-256, which is kept in the user's cache: some files have gigabytes.

    That of a file of this moment is not: it can change again within what the file system's clock tells apart.
    """
    found = file.stat()
    identity = f"{file.resolve()} {found.st_size} {found.st_mtime_ns}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    kept = cache / "rmoe_megatron" / "sha256" / hashlib.sha256(identity.encode()).hexdigest()
    if kept.is_file() and len(text := read_bytes(kept, 64).decode()) == 64:
        return text
    with open_regular(file) as stream:
        text = hashlib.file_digest(stream, "sha256").hexdigest()
    if time.time() - found.st_mtime < SETTLED:
        return text
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(kept, text)
    except OSError:
        pass  # it is only slower the next time
    return text
