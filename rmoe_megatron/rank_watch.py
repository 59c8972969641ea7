"""The end of one rank is the end of all: who failed and why is told to every rank, who falls silent is noticed.

A rank that raises writes its traceback into the job's key-value store; a rank that dies (kill -9, a lost node) stops its
heartbeat there. A thread of every rank reads both and ends its process, whose main thread may wait for ever in a
collective. Each rank listens to the heartbeat of the one before it.
"""

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import torch.distributed as dist

from rmoe_megatron.errors import RunError, UserError

INTERVAL = 2.0  # seconds between heartbeats
SILENCE = 40.0  # seconds without a heartbeat after which a rank is given up
GRACE = 10.0  # seconds in which a rank that failed may end by itself

_FAILURE = "failure"


@contextmanager
def watch_ranks(store: dist.Store, rank: int, world_size: int) -> Iterator[None]:
    """Watch the other ranks for the duration of the context.

    Args:
        store: of the job; a connection of its own is made, so that it may be in use elsewhere.
    """
    connection = store.clone()
    watch = _Watch(dist.PrefixStore("rank_watch", connection), rank, world_size)
    watch.start()
    try:
        yield
    except BaseException as error:
        watch.stop()
        watch.report(error)
        # Cleaning up can wait for ranks that are gone.
        timer = threading.Timer(GRACE, os._exit, (_exit_code(error),))
        timer.daemon = True
        timer.start()
        raise
    watch.stop()
    dist.barrier()  # the store may be another rank's: nobody leaves before everybody has stopped listening


def _exit_code(error: BaseException) -> int:
    return 2 if isinstance(error, UserError) else 1


class _Watch(threading.Thread):
    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        super().__init__(daemon=True, name="rank-watch")
        self.store, self.rank = store, rank
        self.neighbour = (rank - 1) % world_size
        self._stopped = threading.Event()

    def run(self) -> None:
        beats, heard, heard_at = 0, b"", time.monotonic()
        while not self._stopped.wait(INTERVAL):
            try:
                beats += 1
                self.store.set(f"heartbeat.{self.rank}", str(beats))
                if self.store.check([_FAILURE]):
                    code, _, message = self.store.get(_FAILURE).decode().partition(" ")
                    self._end(message, int(code))
                key = f"heartbeat.{self.neighbour}"
                beat = self.store.get(key) if self.store.check([key]) else b""
            except RuntimeError as error:  # DistNetworkError and its like
                if not self._stopped.is_set():
                    self._end(f"The process that holds the job's store is gone ({error}).", 1)
                return
            if beat != heard:
                heard, heard_at = beat, time.monotonic()
            elif time.monotonic() - heard_at > SILENCE:
                message = f"Rank {self.neighbour} has not been heard of for {SILENCE:.0f} s; it died or its host did."
                self.store.compare_set(_FAILURE, "", f"1 {message}")
                self._end(message, 1)

    def stop(self) -> None:
        """Stop listening."""
        self._stopped.set()
        self.join()

    def report(self, error: BaseException) -> None:
        """Tell the other ranks why this one ends; the first to do so is the one they hear."""
        reason = (
            str(error)
            if isinstance(error, (UserError, RunError))
            else "".join(traceback.format_exception(error))
        )
        message = f"{_exit_code(error)} Rank {self.rank} on {socket.gethostname()} failed: {reason}"
        with suppress(RuntimeError):  # the store is gone, and with it the ranks that could read it
            self.store.compare_set(_FAILURE, "", message)

    def _end(self, message: str, code: int) -> NoReturn:
        with suppress(OSError):  # where what ran the ranks is gone, nobody reads what they print
            print(f"error: rank {self.rank} ends because another did. {message}", file=sys.stderr, flush=True)
        os._exit(code)
