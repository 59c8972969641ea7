"""Samples that cannot be used: named in ``bad_samples.jsonl``, and an end to a run that has too many of them."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from rmoe_megatron.config.run import BadSamplesPolicy, DataConfig
from rmoe_megatron.data.training_dataset import BadSample
from rmoe_megatron.errors import UserError
from rmoe_megatron.files.disk_errors import warned
from rmoe_megatron.files.regular import open_to_append

logger = logging.getLogger(__name__)

BAD_SAMPLES = "bad_samples.jsonl"
ALLOWED = 8  # bad samples that end no run, whatever fraction they are


class BadSamples:
    """Takes note of what the loader could not use, on the data-parallel rank that drew it.

    Attributes:
        draws: how many samples this rank has drawn since its process started.
        bad: samples among them in whose place another was taken.
    """

    def __init__(self, config: DataConfig, run_dir: Path, device: torch.device) -> None:
        self.config, self.path, self.device = config, run_dir / BAD_SAMPLES, device
        self.draws = self.bad = 0

    def note(self, collated: dict[str, Any]) -> None:
        """Count and name the bad samples of a micro-batch of the loader.

        Raises:
            UserError: there is one, and the configuration says to stop.
        """
        found = collated["bad_samples"]
        self.draws += len(collated["draw_index"])
        self.bad += len(found)
        if not found or not _reports():
            return
        lines = [
            {"draw": each.draw, "shard": each.shard, "key": each.key, "reason": each.reason} for each in found
        ]
        # One write to the end of the file: other ranks write there too.
        with warned(f"{BAD_SAMPLES} lacks {len(lines)} samples"), open_to_append(self.path) as file:
            os.write(file.fileno(), "".join(f"{json.dumps(line)}\n" for line in lines).encode())
        first = found[0]
        if self.config.bad_samples is BadSamplesPolicy.stop:
            raise UserError(
                f"Sample {first.key} of {first.shard} cannot be used ({first.reason}); remove it, or set data.bad_samples=skip "
                "to have the next one take its place."
            )
        warn(found)

    def check(self) -> dict[str, float]:
        """Return what is logged of the bad samples of all ranks, nothing if there are none. Every rank takes part.

        Raises:
            UserError: they are too many.
        """
        counts = torch.tensor([self.bad, self.draws], dtype=torch.int64, device=self.device)
        dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
        bad, draws = counts.tolist()
        if bad > max(ALLOWED, self.config.max_bad_fraction * draws):
            raise UserError(
                f"{bad} of the {draws} samples drawn since the start cannot be used, more than data.max_bad_fraction "
                f"({self.config.max_bad_fraction}) allows; {self.path} names them."
            )
        return {"bad_samples": bad} if bad else {}


def warn(found: list[BadSample]) -> None:
    """Warn of the samples of a micro-batch that could not be used."""
    for each in found:
        logger.warning(
            "Sample %s of %s cannot be used (%s); the next one takes its place.",
            each.key,
            each.shard,
            each.reason,
        )


def _reports() -> bool:
    """Whether this rank reports for those that draw the same samples."""
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
        and parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    )
