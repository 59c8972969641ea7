"""``rmoe`` on a disk that fails: tests/support/disk_faults.c in front of the C library, in a process that forks one for each command."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.commands import PRELOADED, become

SOURCE = Path(__file__).with_name("disk_faults.c")
TIMEOUT = 120.0  # seconds that a command may take


def compiler() -> str | None:
    """Return the C compiler of this machine, if there is one."""
    return shutil.which("cc") or shutil.which("gcc")


@dataclass(frozen=True)
class Fault:
    """What the disk does below a folder.

    Attributes:
        nth: number of the call that fails, from 1; 0 is none.
        error: which error it answers, as ``errno`` has it.
        lasts: all later calls fail, too; those that make room do not, where the disk is full.
        rank: in whose process calls are counted and fail; -1 is every one.
    """

    nth: int = 0
    error: int = 0
    lasts: bool = False
    rank: int = -1


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code, standard error, and the calls that it made, each with its kind and path."""

    code: int
    said: str
    calls: list[tuple[str, str]]


class FaultyDisk:
    """Runs ``rmoe`` as often as wanted, each time with one fault below a folder.

    Args:
        folder: for what this needs itself, apart from where commands write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        library, command = folder / "disk_faults.so", compiler()
        assert command is not None
        subprocess.run(
            [command, "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"], check=True
        )
        environment = {
            **os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            "XDG_CACHE_HOME": str(folder / "cache"),
        }  # fmt: skip
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.disk_faults"],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(
        self, arguments: list[str], at: Path, below: Path, fault: Fault | None = None, ranks: int = 1
    ) -> Outcome:
        """Run ``rmoe`` in the folder ``at``, with a fault ``below`` a folder, whose name has no links."""
        fault = fault or Fault()
        notes, errors = self.folder / "calls", self.folder / "stderr"
        for file in (notes, errors):
            file.write_text("")
        asked = {
            "arguments": arguments, "at": str(at), "errors": str(errors), "ranks": ranks,
            "arm": [str(below), str(notes), fault.nth, fault.error, int(fault.lasts), fault.rank],
        }  # fmt: skip
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(asked) + "\n")
        self.server.stdin.flush()
        code = json.loads(self.server.stdout.readline())
        assert code is not None, f"{arguments} took longer than {TIMEOUT} s: {errors.read_text()}"
        calls = [tuple(line.split(" ", 1)) for line in notes.read_text().splitlines()]
        return Outcome(code, errors.read_text(), calls)  # type: ignore[arg-type]

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(timeout=30)


def _serve() -> None:
    # What libraries print is not for the pipe.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in PRELOADED:
        __import__(name)
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            os.setsid()
            _arm(*asked["arm"])
            become(
                asked["arguments"], asked["ranks"], dict(os.environ), Path(asked["at"]), Path(asked["errors"])
            )
        answers.write(json.dumps(_code_of(child)) + "\n")
        answers.flush()


def _arm(below: str, notes: str, nth: int, error: int, lasts: int, rank: int) -> None:
    library: Any = ctypes.CDLL(None)
    library.disk_faults_arm(below.encode(), notes.encode(), nth, error, lasts, rank)


def _code_of(child: int) -> int | None:
    """Return a child's exit code; one that takes too long is killed with its own children, and has none."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    _serve()
