"""Which samples may have spoilt a step whose loss or gradient is not finite."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from rmoe_megatron.data.batch import Batch


@dataclass(frozen=True, order=True)
class Suspect:
    """A sample of a step that was left out, and what of it is not finite: an input, or only the loss it has part in."""

    draw: int
    what: str


def find_suspects(batches: list[Batch], losses: list[Tensor]) -> list[Suspect]:
    """Return what may have spoilt a step, on every rank alike; every rank takes part.

    Samples with an input that is not finite are found on any rank. If there are none, all samples of the
    micro-batches whose loss is not finite are suspected, or all of the step if the gradient alone is not.

    Args:
        batches: this rank's micro-batches.
        losses: the losses of these micro-batches; empty on all pipeline stages but the last.
    """
    inputs = [suspect for batch in batches for suspect in _not_finite_inputs(batch)]
    pairs = list(zip(batches, losses, strict=True)) if losses else []
    step = [(int(draw), loss) for batch, loss in pairs for draw in batch.draw_index]
    spoilt = [Suspect(draw, "loss") for draw, loss in step if not loss.isfinite()]
    kinds = (inputs, spoilt, [Suspect(draw, "gradient") for draw, _ in step])
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, kinds)
    for kind in zip(*everyone, strict=True):
        found = sorted({suspect for suspects in kind for suspect in suspects})
        if found:
            return found
    return []


def _not_finite_inputs(batch: Batch) -> Iterable[Suspect]:
    for name, spoilt in batch.not_finite().items():
        # Encoders give their output on the GPU, the loader numbers of draws on the CPU.
        draws = batch.draw_index.cpu()[spoilt.cpu()]
        yield from (Suspect(int(draw), name) for draw in draws)
