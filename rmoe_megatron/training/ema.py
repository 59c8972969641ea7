"""Exponential moving average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class ExponentialMovingAverage:
    """Float32 average of a model's parameters, of what this rank has of them.

    The decay of update n is ``min(decay, (1 + n) / (10 + n))`` and 0 for the first (n = 0), so that the average forgets
    the initial weights; with a power it is ``min(decay, 1 - (1 + n) ** -power)``. These are the two ramps of
    diffusers' EMAModel.

    Args:
        parameters: by name, those of an engine.
    """

    def __init__(self, parameters: dict[str, Tensor], decay: float, power: float | None = None) -> None:
        self.decay = decay
        self.power = power
        self.parameters = parameters
        self.averages = {
            name: parameter.detach().float().clone() for name, parameter in self.parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the current parameters; ``step`` counts updates from 0."""
        ramp = (1 + step) / (10 + step) if self.power is None else 1 - (1 + step) ** -self.power
        decay = min(self.decay, ramp) if step > 0 else 0.0
        averages = list(self.averages.values())
        current = [parameter.detach().float() for parameter in self.parameters.values()]
        torch._foreach_lerp_(averages, current, 1 - decay)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights for the duration of the context."""
        backup = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._copy_to_model(self.averages)
        try:
            yield
        finally:
            self._copy_to_model(backup)

    def _copy_to_model(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])
