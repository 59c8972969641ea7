"""Units of work that the processes of a job take one by one from a folder that they share; what is done survives them.

A unit is done when its result is on the disk. Who works on one holds a claim (:mod:`rmoe_megatron.files.claims`); the claim of a process
that died becomes void, after a minute or at once if it was on this host. So a slow node holds up nobody, and a job that
is started again, with any number of processes, does again what was in flight and nothing else.
"""

import shutil
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path

from rmoe_megatron.files import claims

POLL = 1.0  # seconds between two looks of a process that waits for the others


class WorkQueue:
    """Hands out the numbers of units.

    Args:
        folder: holds the claims, below one that is there, on a file system that all processes see; it is removed when everything is
            done.
        count: the number of units.
        is_done: whether a unit's result is there.
        first: the unit to begin with, so that processes don't all ask for the same one.
    """

    def __init__(self, folder: Path, count: int, is_done: Callable[[int], bool], first: int = 0) -> None:
        self.folder, self.count, self.is_done, self.first = folder, count, is_done, first

    def take(self, progress: Callable[[int, int], None] | None = None) -> Generator[int]:
        """Yield units to be done, each until it is asked for the next; ends when all units of all processes are done.

        Args:
            progress: called with (units done by anybody, units in total).
        """
        with suppress(
            FileNotFoundError
        ):  # another process has found everything done, and given what it was in another name
            self.folder.mkdir(exist_ok=True)
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
                    try:
                        with claims.kept_young(self._path(unit)):
                            yield unit
                    finally:
                        with suppress(OSError):
                            claims.release(self._path(unit))
                    if progress is not None:
                        break  # to count what the others have done
            if waits:
                time.sleep(POLL)

    def _claim(self, unit: int) -> bool:
        try:
            return claims.take(self._path(unit))
        except FileNotFoundError:  # the folder is gone: another process has found everything done
            return False

    def _path(self, unit: int) -> Path:
        return self.folder / f"{unit:08d}.claim"
