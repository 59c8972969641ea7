"""Bytes that lie elsewhere, read as if they were a file."""

import io
import os
from collections.abc import Callable


class RangeFile(io.RawIOBase):
    """A file whose reads are ranges of something.

    Args:
        read: returns the bytes at an offset, of a size that lies inside.
        size: the number of bytes of the whole file.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self.read_range, self.size, self.position = read, size, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position, also beyond the end."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = max(base + offset, 0)
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill a buffer from the position on; returns how many bytes there were."""
        count = max(min(len(buffer), self.size - self.position), 0)
        content = self.read_range(self.position, count) if count else b""
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)
