"""Steps whose loss or gradient is not finite: left out, counted and explained; too many in a row end the run."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from rmoe_megatron.engine.protocol import Engine, StepResult
from rmoe_megatron.errors import RunError
from rmoe_megatron.files import atomic
from rmoe_megatron.files.disk_errors import warned
from rmoe_megatron.training.logging import json_text

logger = logging.getLogger(__name__)

DIAGNOSIS = "diagnosis.json"
MAX_NAMED = 8  # samples or parameters in a sentence; the diagnosis has all


class Health:
    """Watches the steps of a run.

    Args:
        engine: whose weights are looked at when a run is ended.
        locate: names the shard and key of a draw.
        limit: steps in a row that may be left out.
    """

    def __init__(
        self, run_dir: Path, engine: Engine, locate: Callable[[int], dict[str, str]], limit: int
    ) -> None:
        self.run_dir, self.engine, self.locate, self.limit = run_dir, engine, locate, limit
        self.skipped: list[dict[str, Any]] = []  # in a row, up to now

    def check(self, step: int, result: StepResult) -> None:
        """Take note of a step. Every rank takes part.

        Raises:
            RunError: too many steps in a row were left out; the diagnosis is written.
        """
        if result.suspects is None:
            self.skipped.clear()
            return
        samples = [
            {"draw": each.draw, **self.locate(each.draw), "what": each.what} for each in result.suspects
        ]
        record = {"step": step, "loss": result.loss, "grad_norm": result.grad_norm, "samples": samples}
        self.skipped.append(record)
        if dist.get_rank() == 0:
            logger.warning(
                "Step %d is left out (loss %s, gradient norm %s); suspected: %s.",
                step, result.loss, result.grad_norm, _listed(samples),
            )  # fmt: skip
        if len(self.skipped) >= self.limit:
            self._diagnose(step)
            raise RunError(
                f"{len(self.skipped)} steps in a row, up to step {step}, had a loss or gradient that is not finite; "
                f"the run is ended, its last checkpoint is good, and {self.run_dir / DIAGNOSIS} says what was found."
            )

    def _diagnose(self, step: int) -> None:
        found = _not_finite_parameters(self.engine)
        if dist.get_rank() == 0:
            diagnosis = {"step": step, "skipped": self.skipped, **found}
            with warned(f"{DIAGNOSIS} is not written"):
                atomic.write(self.run_dir / DIAGNOSIS, json_text(diagnosis, indent=1) + "\n")


def _listed(samples: list[dict[str, Any]]) -> str:
    named = [f"{each['key']} of {each['shard']} ({each['what']})" for each in samples[:MAX_NAMED]]
    more = f" and {len(samples) - MAX_NAMED} more" if len(samples) > MAX_NAMED else ""
    return (", ".join(named) or "no sample") + more


def _not_finite_parameters(engine: Engine) -> dict[str, list[str] | None]:
    """Name the trained parameters whose values or gradients are not finite on any rank; every rank takes part.

    Gradients are None where the engine has given them up after the step: DeepSpeed's.
    """
    keys, values, gradients = engine.state_keys(), set(), set()
    has_gradients = any(hasattr(parameter, "main_grad") for parameter in engine.parameters.values())
    for name, parameter in engine.parameters.items():
        gradient = getattr(parameter, "main_grad", None)  # of Megatron-Core's data parallelism
        if not parameter.isfinite().all():
            values.add(keys[name])
        if gradient is not None and not gradient.isfinite().all():
            gradients.add(keys[name])
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (values, gradients))
    all_values, all_gradients = (sorted(set().union(*found)) for found in zip(*everyone, strict=True))
    return {"parameters": all_values, "gradients": all_gradients if has_gradients else None}
