"""The end of one rank is the end of all: who failed and why is told to every rank, who falls silent is noticed.

A rank that raises writes its traceback into the job's key-value store; a rank that dies (kill -9, a lost node) or is stopped
(SIGSTOP) has no heartbeat there any more. Every rank has a thread that writes and reads the store and one that watches the first: the
store itself falls silent when the rank that holds it is stopped. Either ends its process, whose main thread may wait for ever in a
collective. Each rank listens to the heartbeat of the one before it.

Silence is counted in the rank's own intervals, not in seconds: a job that is suspended as a whole and goes on later has not been silent.
"""

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import NoReturn

import torch.distributed as dist
from torch.distributed import rendezvous

from rmoe_megatron.distributed import launch
from rmoe_megatron.errors import UserError, exit_code
from rmoe_megatron.files.disk_errors import message_of

INTERVAL = 2.0  # seconds between heartbeats
SILENCE = 40.0  # seconds without a heartbeat after which a rank is given up
GRACE = 10.0  # seconds in which a rank that failed may end by itself
MEETING = 60.0  # seconds that a rank which fails before the ranks have met waits for the others, to tell them

_FAILURE, _HEARD = "failure", "heard"


@contextmanager
def watch_ranks(store: dist.Store, rank: int, world_size: int) -> Iterator[None]:
    """Watch the other ranks for the duration of the context, in which torch.distributed is set up.

    Args:
        store: the job's store; a connection of its own is made, so that it may be in use elsewhere.
    """
    watch = _Watch(dist.PrefixStore("rank_watch", store.clone()), rank, world_size)
    watch.start()
    try:
        yield
        watch.is_ending = True
        dist.barrier()  # the store may be another rank's: nobody leaves before everybody is done
    except BaseException as error:
        # Cleaning up can wait for ranks that are gone, and so can the store.
        timer = threading.Timer(GRACE, os._exit, (exit_code(error),))
        timer.daemon = True
        timer.start()
        watch.stop()
        _within(GRACE / 2, partial(watch.report, error))
        raise
    watch.stop()


@contextmanager
def telling_all_ranks() -> Iterator[None]:
    """Tell the other ranks of an error in the context before :func:`watch_ranks`, for which they would wait.

    torchrun's agent ends the others by itself; ``srun`` waits.
    """
    try:
        yield
    except Exception as error:
        if not _Watch.has_started and not os.environ.get("GROUP_WORLD_SIZE"):
            with suppress(UserError):  # the variables that would say who the others are are what is wrong
                if launch.world_size() > 1:
                    _meet_and_tell(error)
        raise


def _meet_and_tell(error: Exception) -> None:
    rank, world_size, deadline = launch.rank(), launch.world_size(), time.monotonic() + MEETING
    try:
        opened, _, _ = next(rendezvous(launch.rendezvous_url(), timeout=timedelta(seconds=MEETING)))
        _tell(dist.PrefixStore("rank_watch", opened), rank, world_size, error, deadline)
    except RuntimeError:  # nobody has come
        if not launch.is_main_process():
            print(f"error: {_message(rank, error).partition(' ')[2]}", file=sys.stderr, flush=True)


def _tell(store: dist.Store, rank: int, world_size: int, error: BaseException, deadline: float) -> None:
    """Write down why this rank ends; the first one, which may hold the store, waits until all others have read it."""
    store.compare_set(_FAILURE, "", _message(rank, error))
    heard = store.add(_HEARD, 1)
    while rank == 0 and heard < world_size and time.monotonic() < deadline:
        time.sleep(0.1)
        heard = store.add(_HEARD, 0)


def _message(rank: int, error: BaseException) -> str:
    reason = message_of(error) or "".join(traceback.format_exception(error))
    return f"{exit_code(error)} Rank {rank} on {socket.gethostname()} failed: {reason}"


def _within(seconds: float, call: Callable[[], object]) -> None:
    """Call a function, and go on after some seconds whether it has returned or not."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)


class _Silence:
    """Counts how often in a row something has not changed."""

    def __init__(self) -> None:
        self.last: object = None
        self.count = 0

    def is_too_long(self, now: object) -> bool:
        self.count = 0 if now != self.last else self.count + 1
        self.last = now
        return self.count * INTERVAL > SILENCE


class _Watch(threading.Thread):
    """Ends this process when another rank has failed or is silent, or when the store is.

    Attributes:
        is_ending: this rank has done its work; another one that holds the store may be gone.
        has_started: in this process, at some time.
    """

    has_started = False

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        super().__init__(daemon=True, name="rank-watch")
        self.store, self.rank, self.world_size = store, rank, world_size
        self.neighbour = (rank - 1) % world_size
        self.is_ending = False
        self.answers, self.beat = 0, b""
        self._stopped = threading.Event()
        _Watch.has_started = True

    def run(self) -> None:
        threading.Thread(target=self._correspond, daemon=True, name="rank-heartbeat").start()
        store, neighbour = _Silence(), _Silence()
        while not self._stopped.wait(INTERVAL):
            if store.is_too_long(self.answers) and not self.is_ending:
                self._end(
                    f"The process that holds the job's store has not answered for {SILENCE:.0f} s; it is stopped, or its host "
                    "is gone.",
                    1,
                )
            # Before its first heartbeat a rank may still be on its way.
            if neighbour.is_too_long(self.beat) and self.beat:
                message = f"Rank {self.neighbour} has not been heard of for {SILENCE:.0f} s; it died or its host did."
                _within(INTERVAL, partial(self.store.compare_set, _FAILURE, "", f"1 {message}"))
                self._end(message, 1)

    def _correspond(self) -> None:
        """Write this rank's heartbeat and read what the others have written; the store may keep it waiting for ever."""
        key = f"heartbeat.{self.neighbour}"
        while not self._stopped.is_set():
            try:
                self.store.set(f"heartbeat.{self.rank}", str(self.answers))
                failure = self.store.get(_FAILURE) if self.store.check([_FAILURE]) else b""
                self.beat = self.store.get(key) if self.store.check([key]) else b""
                if failure and not self._stopped.is_set():
                    self.store.add(_HEARD, 1)
                    code, _, message = failure.decode().partition(" ")
                    self._end(message, int(code))
            except RuntimeError as error:  # DistNetworkError and its like
                if not self._stopped.is_set() and not self.is_ending:
                    self._end(f"The process that holds the job's store is gone ({error}).", 1)
                return
            self.answers += 1
            self._stopped.wait(INTERVAL)

    def stop(self) -> None:
        """Stop listening."""
        self._stopped.set()
        self.join()

    def report(self, error: BaseException) -> None:
        """Tell the other ranks why this one ends; the first to do so is the one they hear."""
        with suppress(RuntimeError):  # the store is gone, and with it the ranks that could read it
            _tell(self.store, self.rank, self.world_size, error, time.monotonic() + GRACE)

    def _end(self, message: str, code: int) -> NoReturn:
        with suppress(OSError):  # where what ran the ranks is gone, nobody reads what they print
            print(f"error: rank {self.rank} ends because another did. {message}", file=sys.stderr, flush=True)
        os._exit(code)
