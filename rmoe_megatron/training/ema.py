"""Exponential moving average of the weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from rmoe_megatron.engine.protocol import MainWeight


class ExponentialMovingAverage:
    """Float32 average of a model's weights, of what this rank has of them.

    The decay of update n is ``min(decay, (1 + n) / (10 + n))`` and 0 for the first (n = 0), so that the average forgets
    the initial weights; with a power it is ``min(decay, 1 - (1 + n) ** -power)``. These are the two ramps of
    diffusers' EMAModel.

    Parameters in bf16 are rounded: a small learning rate moves them by less than a rounding step most of the time. So the
    average follows the optimizer's float32 weights instead. Where ranks share those, each averages its part, and
    :meth:`complete` brings the parts together.

    Args:
        parameters: by name, those of an engine.
        main_weights: an engine's method of this name.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        decay: float,
        power: float | None = None,
        main_weights: Callable[[], dict[str, MainWeight]] = dict,
    ) -> None:
        self.decay = decay
        self.power = power
        self.parameters = parameters
        self.main_weights = main_weights
        self.averages = {
            name: parameter.detach().float().clone() for name, parameter in self.parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the current weights; ``step`` counts updates from 0."""
        ramp = (1 + step) / (10 + step) if self.power is None else 1 - (1 + step) ** -self.power
        decay = min(self.decay, ramp) if step > 0 else 0.0
        averages, current, main_weights = [], [], self.main_weights()
        for name, parameter in self.parameters.items():
            average = self.averages[name]
            if name not in main_weights:
                averages.append(average)
                current.append(parameter.detach().float())
            elif (values := main_weights[name].values).numel() > 0:
                averages.append(average.view(-1).narrow(0, main_weights[name].start, values.numel()))
                current.append(values.detach().to(average.device))
        torch._foreach_lerp_(averages, current, 1 - decay)

    @torch.no_grad()
    def complete(self) -> None:
        """Bring together what ranks have averaged a part of each, before the averages are looked at; every rank takes part."""
        for name, main_weight in self.main_weights().items():
            if main_weight.group is not None and main_weight.group.size() > 1:
                flat, end = self.averages[name].view(-1), main_weight.start + main_weight.values.numel()
                flat[: main_weight.start].zero_()
                flat[end:].zero_()
                dist.all_reduce(flat, group=main_weight.group)  # of one part and zeros

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights for the duration of the context; every rank takes part."""
        self.complete()
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
