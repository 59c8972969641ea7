"""Units of work that the processes of a job take one by one from a folder that they share; what is done survives them.

A unit is done when its result is on the disk. Who works on one holds a claim, a file that a thread keeps young; the claim of a
process that died becomes void, after a minute or at once if it was on this host. So a slow node holds up nobody, and a job that
is started again, with any number of processes, does again what was in flight and nothing else.
"""

import os
import shutil
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LEASE = 60.0  # seconds after which a claim that nobody keeps young is void
HEARTBEAT = 10.0
POLL = 1.0  # seconds between two looks of a process that waits for the others


class WorkQueue:
    """Hands out the numbers of units.

    Args:
        folder: of the claims, on a file system that all processes see; it is removed when everything is done.
        count: of the units.
        is_done: whether a unit's result is there.
        first: the unit to begin with, so that processes don't all ask for the same one.
    """

    def __init__(self, folder: Path, count: int, is_done: Callable[[int], bool], first: int = 0) -> None:
        self.folder, self.count, self.is_done, self.first = folder, count, is_done, first
        self.me = f"{socket.gethostname()} {os.getpid()}"

    def take(self, progress: Callable[[int, int], None] | None = None) -> Iterator[int]:
        """Yield units to be done, each until it is asked for the next; ends when all units of all processes are done.

        Args:
            progress: called with (units done by anybody, units in total).
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            open_units = [unit for unit in range(self.count) if not self.is_done(unit)]
            if progress is not None:
                progress(self.count - len(open_units), self.count)
            if not open_units:
                shutil.rmtree(self.folder, ignore_errors=True)  # others may do so too
                return
            waits = True
            for unit in sorted(open_units, key=lambda unit: (unit - self.first) % self.count):
                if not self.is_done(unit) and self._claim(unit):
                    waits = False
                    with _kept_young(self._path(unit)):
                        yield unit
                    self._path(unit).unlink(missing_ok=True)
                    if progress is not None:
                        break  # to count what the others have done
            if waits:
                time.sleep(POLL)

    def _path(self, unit: int) -> Path:
        return self.folder / f"{unit:08d}.claim"

    def _claim(self, unit: int) -> bool:
        path = self._path(unit)
        if self._is_void(path):
            # At worst two that see it so at the same moment both do the unit, with the same result.
            with suppress(FileNotFoundError):
                path.rename(path.with_name(f"{path.name}.{self.me.replace(' ', '.')}.void"))
        try:
            with path.open("x") as file:
                file.write(self.me)
        except FileExistsError:
            return False
        except FileNotFoundError:  # the folder is gone: another process has found everything done
            return False
        return True

    def _is_void(self, path: Path) -> bool:
        try:
            found = path.lstat()
            if not stat.S_ISREG(found.st_mode):  # a pipe would keep who reads it waiting
                return True
            host, _, process = path.read_text().partition(" ")
            age = time.time() - found.st_mtime
        except FileNotFoundError:
            return False
        if host == socket.gethostname() and process.isdigit() and not _is_alive(int(process)):
            return True
        return age > LEASE


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _kept_young(path: Path) -> Iterator[None]:
    """Touch a claim until the context ends."""
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(HEARTBEAT):
            with suppress(FileNotFoundError):
                os.utime(path)

    threading.Thread(target=touch, daemon=True, name="claim").start()
    try:
        yield
    finally:
        ended.set()
