"""Steps whose loss or gradient is not finite: left out, counted and explained; too many in a row end the run."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from rmoe_megatron import durable
from rmoe_megatron.checkpoint.state import full_state
from rmoe_megatron.errors import RunFailure
from rmoe_megatron.training.logging import json_text

logger = logging.getLogger(__name__)

DIAGNOSIS = "diagnosis.json"
MAX_NAMED = 8  # samples or parameters in a sentence; the diagnosis has all


@dataclass(frozen=True, order=True)
class Suspect:
    """A sample of a step that was left out, and what of it is not finite: an input, or only the loss it has part in."""

    draw: int
    what: str


def find_suspects(batches: list[dict[str, Tensor]], losses: list[Tensor]) -> list[Suspect]:
    """Return what may have spoilt a step, on every rank alike; every rank takes part.

    Samples with an input that is not finite are found on any rank. If there are none, all samples of the
    micro-batches whose loss is not finite are suspected, or all of the step if the gradient alone is not.

    Args:
        batches: this rank's micro-batches, with ``sample_index`` int64 [B].
        losses: of these micro-batches; empty on all pipeline stages but the last.
    """
    inputs = [suspect for batch in batches for suspect in _not_finite_inputs(batch)]
    draws = [[int(draw) for draw in batch["sample_index"]] for batch in batches]
    pairs = list(zip(draws, losses, strict=True)) if losses else []
    spoilt = [Suspect(draw, "loss") for batch, loss in pairs if not loss.isfinite() for draw in batch]
    step = [Suspect(draw, "gradient") for batch, _ in pairs for draw in batch]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (inputs, spoilt, step))
    for kind in zip(*everyone, strict=True):
        found = sorted({suspect for suspects in kind for suspect in suspects})
        if found:
            return found
    return []


def _not_finite_inputs(batch: dict[str, Tensor]) -> Iterable[Suspect]:
    for name, values in batch.items():
        if values.is_floating_point():
            finite = values.isfinite().flatten(1).all(dim=1)
            yield from (Suspect(int(draw), name) for draw in batch["sample_index"][~finite.cpu()])


class Health:
    """Watches the steps of a run.

    Args:
        chunks: what this rank has of the model.
        locate: names the shard and key of a draw.
        limit: steps in a row that may be left out.
    """

    def __init__(
        self, run_dir: Path, chunks: nn.ModuleList, locate: Callable[[int], dict[str, str]], limit: int
    ) -> None:
        self.run_dir, self.chunks, self.locate, self.limit = run_dir, chunks, locate, limit
        self.skipped: list[dict[str, Any]] = []  # in a row, up to now

    def check(self, step: int, loss: float, grad_norm: float, suspects: list[Suspect] | None) -> None:
        """Take note of a step; ``suspects`` is None if it was a good one. Every rank takes part.

        Raises:
            RunFailure: too many steps in a row were left out; the diagnosis is written.
        """
        if suspects is None:
            self.skipped.clear()
            return
        samples = [{"draw": each.draw, **self.locate(each.draw), "what": each.what} for each in suspects]
        record = {"step": step, "loss": loss, "grad_norm": grad_norm, "samples": samples}
        self.skipped.append(record)
        if dist.get_rank() == 0:
            logger.warning(
                "Step %d is left out (loss %s, gradient norm %s); suspected: %s.",
                step, loss, grad_norm, _listed(samples),
            )  # fmt: skip
        if len(self.skipped) >= self.limit:
            self._diagnose(step)
            raise RunFailure(
                f"{len(self.skipped)} steps in a row, up to step {step}, had a loss or gradient that is not finite; "
                f"the run is ended, its last checkpoint is good, and {self.run_dir / DIAGNOSIS} says what was found."
            )

    def _diagnose(self, step: int) -> None:
        found = _not_finite_parameters(self.chunks)
        if dist.get_rank() == 0:
            diagnosis = {"step": step, "skipped": self.skipped, **found}
            durable.write(self.run_dir / DIAGNOSIS, json_text(diagnosis, indent=1) + "\n")


def _listed(samples: list[dict[str, Any]]) -> str:
    named = [f"{each['key']} of {each['shard']} ({each['what']})" for each in samples[:MAX_NAMED]]
    more = f" and {len(samples) - MAX_NAMED} more" if len(samples) > MAX_NAMED else ""
    return (", ".join(named) or "no sample") + more


def _not_finite_parameters(chunks: nn.ModuleList) -> dict[str, list[str]]:
    """Name the parameters whose values or gradients are not finite on any rank; every rank takes part."""
    keys = {name: getattr(entry, "key", name) for name, entry in full_state(chunks).items()}
    values, gradients = set(), set()
    for name, parameter in chunks.named_parameters():
        gradient = getattr(parameter, "main_grad", None)  # of Megatron-Core's data parallelism
        if not parameter.isfinite().all():
            values.add(keys[name])
        if gradient is not None and not gradient.isfinite().all():
            gradients.add(keys[name])
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (values, gradients))
    names = ("parameters", "gradients")
    return {
        name: sorted(set().union(*found))
        for name, found in zip(names, zip(*everyone, strict=True), strict=True)
    }
