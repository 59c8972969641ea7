"""A bounded folder of this machine's disk with blocks of remote files; the processes of a machine share it."""

import fcntl
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

BLOCK = 1 << 22  # bytes of a file
_SWEEP = 16  # a process looks at the whole folder when it has written this fraction of the limit
_KEPT = 0.9  # of the limit, after blocks were removed


class BlockCache:
    """Blocks of files, of which those that were used longest ago go when there are too many.

    Args:
        folder: made if it is missing; nothing else should lie in it.
        max_bytes: what all blocks may take; it may be exceeded by a sixteenth for every process that writes.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.written = max_bytes  # so that the first block looks at what was left

    def read(
        self, identity: str, total: int, offset: int, size: int, fetch: Callable[[int, int], bytes]
    ) -> bytes:
        """Return bytes of a file.

        Args:
            identity: names the file and its version.
            total: its bytes.
            fetch: returns (offset, size) of the file where the cache has it not.
        """
        digest = hashlib.sha256(identity.encode()).hexdigest()[:32]
        parts = []
        for number in range(offset // BLOCK, -(-(offset + size) // BLOCK)):
            start = number * BLOCK
            block = self._block(f"{digest}-{number}", start, min(BLOCK, total - start), fetch)
            parts.append(block[max(offset - start, 0) : offset + size - start])
        return b"".join(parts)

    def _block(self, name: str, start: int, size: int, fetch: Callable[[int, int], bytes]) -> bytes:
        path = self.folder / name[:2] / name
        try:
            content = path.read_bytes()
            if len(content) == size:
                os.utime(path)  # for the sweep
                return content
        except OSError:
            pass  # it is not there, or was removed while it was read
        content = fetch(start, size)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f"{name}.{os.getpid()}.partial")
            try:
                unfinished.write_bytes(content)
                unfinished.rename(path)
            except OSError:
                unfinished.unlink(missing_ok=True)
                raise
            self.written += size
            if self.written * _SWEEP >= self.max_bytes:
                self._sweep()
        except OSError as error:
            logger.warning(
                "The cache %s cannot be written (%s); the block is not kept.", self.folder, error.strerror
            )
        return content

    def _sweep(self) -> None:
        """Remove what was used longest ago if there is too much; one process at a time."""
        self.written = 0
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return  # another process is at it
            found = []
            for path in self.folder.glob("??/*"):
                try:
                    described = path.stat()
                except FileNotFoundError:
                    continue
                found.append((described.st_mtime_ns, described.st_size, path))
            total = sum(size for _, size, _ in found)
            if total <= self.max_bytes:
                return
            for _, size, path in sorted(found):
                if total <= self.max_bytes * _KEPT:
                    break
                path.unlink(missing_ok=True)
                total -= size
