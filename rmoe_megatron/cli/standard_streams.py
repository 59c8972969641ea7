"""Standard output and error that outlive their reader: losing the log is no reason to lose the run.

Who reads them may end first (``| head``, a ``tee`` or ``srun`` that was killed, a closed terminal), their disk may be full, and they may
be closed from the start.
"""

import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO


class _LossyFile(io.RawIOBase):
    """A file descriptor to write to; what it does not take is lost without an error."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def write(self, content: Any) -> int:
        left = memoryview(content).cast("B")
        size = len(left)
        try:
            while left:
                left = left[os.write(self.descriptor, left) :]
        except BrokenPipeError:  # for good: what libraries print by themselves is to get lost, too
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.descriptor)
            os.close(null)
        except OSError:
            pass
        return size


def open_closed() -> None:
    """Open those of the three standard descriptors that are closed, on the null device.

    The next files that are opened would get their numbers otherwise, and then hold what any library prints.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: PTH123, SIM115  # by its number


def outlive_reader(*streams: str) -> None:
    """Let what is written to ``stdout`` or ``stderr`` get lost where it cannot be written, instead of raising an error.

    A stream that is no file of the system's (a test's, a notebook's) stays as it is.
    """
    for name in streams:
        stream: TextIO = getattr(sys, name)
        try:
            descriptor = stream.fileno()
        except (AttributeError, OSError, ValueError):
            continue
        with suppress(OSError, ValueError):
            stream.flush()
        lossy = io.TextIOWrapper(
            io.BufferedWriter(_LossyFile(descriptor)),
            encoding=stream.encoding, errors="backslashreplace", line_buffering=True, write_through=True,
        )  # fmt: skip
        setattr(sys, name, lossy)
