"""A run that is asked to stop: by a signal (preemption, a time limit that comes near), or because its time is nearly up.

A signal reaches the ranks at different moments, and some of them not at all. So the ranks ask each other at places that all of
them pass: before every step, between the batches of validation and between the timesteps of sampling. There they stop together.
"""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from rmoe_megatron.distributed import stop_signals
from rmoe_megatron.distributed.launch import end_of_job, rank

SAVES_LEFT = 2  # a run stops when no more time is left than so many saves take
FIRST_SAVE = 30.0  # seconds that a save is taken to last before one was measured

_REASONS = ["", "the job's time limit", *(number.name for number in stop_signals.SIGNALS)]


class StopRequest(Exception):  # noqa: N818  # nothing is wrong
    """Raised on all ranks at the same place; the message says why."""


class Interruption:
    """Whether the run is to stop, as all ranks see it alike.

    Attributes:
        save_seconds: what a save lasts, as far as is known.

    Args:
        clock: seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.save_seconds = FIRST_SAVE
        self.clock = clock
        # One clock decides: another node's may be wrong, and then only its own ranks would see the end.
        self.end = end_of_job() if rank() == 0 else None

    def check(self) -> None:
        """Go on, or stop on all ranks; every rank takes part.

        Raises:
            StopRequest: some rank was asked to stop.
        """
        code = torch.tensor([self._reason()])
        dist.all_reduce(code, op=dist.ReduceOp.MAX)  # on the CPU, whatever the run computes on
        if code:
            raise StopRequest(_REASONS[int(code)])

    def _reason(self) -> int:
        if stop_signals.received:
            return _REASONS.index(stop_signals.received[0][0])
        is_late = self.end is not None and self.clock() > self.end - SAVES_LEFT * self.save_seconds
        return int(is_late)
