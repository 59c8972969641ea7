"""One process group trains in a run folder at a time: two would overwrite each other's log and checkpoints.

Rank 0 holds a lock of the file system, which the system lets go of when the process dies. When SLURM loses a node it starts the
job again elsewhere, and what ran on the lost node may still run there. So a later start of the same job writes down that it
takes over; an earlier one looks for that every second and before it publishes anything, and ends.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TextIO

from pydantic import TypeAdapter

from rmoe_megatron.distributed.launch import job_id, restart_count
from rmoe_megatron.errors import RunError, UserError
from rmoe_megatron.files import atomic
from rmoe_megatron.files.disk_errors import about
from rmoe_megatron.files.regular import check_regular, check_subfolder, open_to_append
from rmoe_megatron.files.untrusted import parse_json, read_json
from rmoe_megatron.training.history import HISTORY

logger = logging.getLogger(__name__)

LOCK, TAKEOVER = "run.lock", "run.takeover"
INTERVAL = 1.0  # seconds between two looks for a successor
MAX_HOLDER = 4096  # characters that the lock file says of its holder
WRITTEN = ("checkpoints", "samples", "tensorboard", "wandb")  # folders of a run
PATIENCE = 120.0  # seconds that a later start of a job waits for the end of an earlier one

# What a file system answers that has no locks (Lustre without its flock option, NFS without lockd, some of object stores).
WITHOUT_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL}

STARTED = TypeAdapter(dict[str, str | int | None])


def check_files(run_dir: Path) -> None:
    """Check that what a run writes in its folder stays there, before anything of the run is built.

    Raises:
        UserError: a folder is a link out of it, or a file cannot be written.
    """
    for name in WRITTEN:
        check_subfolder(run_dir / name, run_dir)
    for name in (LOCK, TAKEOVER, HISTORY, "metrics.jsonl", "bad_samples.jsonl"):
        if os.path.lexists(run_dir / name):
            check_regular(run_dir / name)


class Fence:
    """Keeps an earlier start of a SLURM job from writing into a run that a later one has taken over."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.path = run_dir, run_dir / TAKEOVER
        self.mine = {"job": job_id(), "restart": restart_count()}

    def raise_for_others(self) -> None:
        """Tell earlier starts of this job that their time is over."""
        if self.mine["job"] is not None and self.mine["restart"]:
            atomic.write(self.path, json.dumps(self.mine))

    def check(self) -> None:
        """Check that no later start of this job has taken over.

        Raises:
            RunError: one has.
        """
        if self.mine["job"] is not None and os.path.lexists(self.path):
            # Opened anew each time: a network file system shows what others wrote to who opens a file.
            later = read_json(self.path, STARTED)
            if self._is_earlier(self.mine, later):
                raise RunError(
                    f"SLURM has started job {self.mine['job']} again (restart {later['restart']}), which has taken over "
                    f"{self.run_dir}; this start of it ends without writing more."
                )

    def precedes_me(self, holder: dict[str, str | int | None]) -> bool:
        """Whether another process is of an earlier start of this job."""
        return self._is_earlier(holder, self.mine)

    @staticmethod
    def _is_earlier(one: dict[str, str | int | None], other: dict[str, str | int | None]) -> bool:
        same = one.get("job") is not None and one.get("job") == other.get("job")
        return same and int(one.get("restart") or 0) < int(other.get("restart") or 0)


@contextmanager
def exclusive(run_dir: Path) -> Iterator[Fence]:
    """Hold the run folder for the duration of the context; rank 0 calls it for all.

    The lock belongs to this process alone, not to its children, and a lock file left behind by a killed run is no obstacle.

    Yields:
        What is to be asked before anything is published.

    Raises:
        UserError: another process holds it, which the error names; or a part of the folder is a link out of it.
        RunError: an earlier start of this SLURM job holds it and does not end.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    check_files(run_dir)
    fence = Fence(run_dir)
    fence.raise_for_others()
    # Closing any descriptor of the file would let go of the lock: nothing else may open it in this process.
    with open_to_append(run_dir / LOCK) as file:
        _acquire(file, run_dir, fence)
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": started, **fence.mine}
        with about(run_dir / LOCK):
            file.truncate(0)
            os.write(file.fileno(), json.dumps(holder).encode())
        ended = threading.Event()
        threading.Thread(target=_watch, args=(fence, ended), daemon=True, name="run-lock").start()
        try:
            yield fence
        finally:
            ended.set()
        with suppress(OSError):
            file.truncate(0)


def _acquire(file: TextIO, run_dir: Path, fence: Fence) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno in WITHOUT_LOCKS:
                logger.warning(
                    "The file system of %s has no locks (%s), so nothing keeps a second run out of this folder; train in it "
                    "with one job at a time.", run_dir, error.strerror,
                )  # fmt: skip
                return
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"{run_dir / LOCK} cannot be locked ({error.strerror}); look after its file system, or choose another "
                    "run_dir."
                ) from error
            file.seek(0)
            holder, name = _holder(file.read(MAX_HOLDER))
            if not fence.precedes_me(holder):
                raise UserError(
                    f"{run_dir} is in use by {name}; wait for it, stop it, or choose another run_dir."
                ) from error
            if time.monotonic() > deadline:
                raise RunError(
                    f"{run_dir} is still held by {name}, of an earlier start of this job, after {PATIENCE:.0f} s; "
                    "end that process, then resume."
                ) from error
        time.sleep(INTERVAL)


def _holder(content: str) -> tuple[dict[str, str | int | None], str]:
    """Return what the lock file says of its holder, and how a sentence calls it."""
    try:
        holder = parse_json(content, STARTED, LOCK)
        return holder, f"process {holder['pid']} on {holder['host']} since {holder['started']}"
    except (UserError, KeyError):
        return {}, "another process"  # which has not written who it is yet


def _watch(fence: Fence, ended: threading.Event) -> None:
    while not ended.wait(INTERVAL):
        try:
            fence.check()
        except RunError as error:
            with suppress(OSError):  # where what ran the ranks is gone, nobody reads what they print
                print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(1)  # the main thread may wait in a collective for ranks that are gone
        except (UserError, OSError):
            continue  # it cannot be read just now
