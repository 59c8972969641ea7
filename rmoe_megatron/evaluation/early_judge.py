"""Judges are loaded before the first image is made, so that one that is missing or wrong is said at once and not after hours."""

from collections.abc import Callable
from typing import Protocol, Self

import torch

from rmoe_megatron.distributed.device import inference_device
from rmoe_megatron.distributed.launch import local_rank


class Judge(Protocol):
    """What looks at images with a model of its own."""

    def to(self, device: torch.device) -> Self:
        """Move the model, and return the judge."""
        ...


class EarlyJudge[T: Judge]:
    """A judge that waits in the host's memory while images are made, and goes to this rank's GPU when it is asked for.

    Args:
        load: loads it.
        is_needed: whether there is anything left to judge; otherwise it is not loaded.

    Raises:
        UserError: it is not here and cannot be downloaded.
    """

    def __init__(self, load: Callable[[], T], is_needed: bool) -> None:
        self.load = load
        self.waiting = load().to(torch.device("cpu")) if is_needed else None
        self.ready: T | None = None

    def __call__(self) -> T:
        """Return the judge, on this rank's device."""
        if self.ready is None:
            self.ready = (self.waiting or self.load()).to(inference_device(local_rank()))
        return self.ready
