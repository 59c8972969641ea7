"""Saves what changes while a run trains, and loads it under whatever parallel layout the run is resumed in."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from rmoe_megatron.checkpoint.folders import (
    CheckpointFolder,
    checkpoint_path,
    forget_pending,
    pending_of,
    read_state,
    remove_old,
)
from rmoe_megatron.checkpoint.saving import new_checkpoint, save_sharded
from rmoe_megatron.checkpoint.size import checkpoint_bytes
from rmoe_megatron.checkpoint.unpickling import read_metadata
from rmoe_megatron.config.loading import save_config
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.distributed.launch import job_id
from rmoe_megatron.errors import RunError, UserError
from rmoe_megatron.files.foreign_errors import refusal


@dataclass
class Progress:
    """Where a run is: optimizer steps done and samples drawn; the data order is a function of the latter.

    ``skipped_steps`` counts the steps that left the weights alone because a loss or gradient was not finite; ``pending``
    is what follows the last step and is not done yet: validation, a checkpoint, samples, in this order; ``validation_loss``
    is that after the last step, if it was validated.
    """

    step: int = 0
    samples: int = 0
    skipped_steps: int = 0
    pending: list[str] = field(default_factory=list)
    validation_loss: float | None = None


class SavedState(Protocol):
    """What of a run is saved and loaded, besides its configuration and its random states."""

    progress: Progress
    base_fingerprint: str | None

    def complete_tensors(self) -> list[tuple[str, Tensor]]:
        """Return this rank's weights and averages, named, as they are saved; every rank takes part."""
        ...

    def sharded_state_dict(self, is_loading: bool) -> dict[str, Any]:
        """Describe the state to dist_checkpointing; with ``is_loading`` it names where loaded values go."""
        ...

    def take_over(self, loaded: dict[str, Any]) -> None:
        """Take over what was loaded into :meth:`sharded_state_dict`."""
        ...


def rng_state() -> dict[str, Any]:
    """Return the random states of this rank; a run on another number of ranks starts from its seed instead.

    Training draws its numbers from :mod:`rmoe_megatron.counter_rng`, which has no state; these states matter to
    layers that use torch's generators.
    """
    states = {"default": torch.get_rng_state()}
    states |= tensor_parallel.get_cuda_rng_tracker().get_states()
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return {
        name: ShardedTensor.from_rank_offsets(
            f"rng.{name}.world_size_{world_size}", state.unsqueeze(0), (0, rank, world_size)
        )
        for name, state in states.items()
    }


def save_checkpoint(
    state: SavedState,
    config: RunConfig,
    run_dir: Path,
    before_publishing: Callable[[], None] = lambda: None,
) -> Path:
    """Save the state under ``run_dir`` and return the published folder; every rank takes part.

    Args:
        before_publishing: called by rank 0 when all is written; if it raises nothing is published.

    Raises:
        RunError: weights or averages are not finite; nothing is published and nothing removed.
        NotSavedError: the system has refused to write something.
    """
    check_finite(state.complete_tensors(), state.progress.step)
    final, is_rank0 = checkpoint_path(run_dir, state.progress.step), dist.get_rank() == 0
    with new_checkpoint(final, before_publishing, size=checkpoint_bytes(config)) as partial:
        save_sharded(state.sharded_state_dict(is_loading=False) | {"rng": rng_state()}, partial)
        if is_rank0:
            forget_pending(run_dir)
            save_config(config, partial / "config.yaml")
            run_state: dict[str, Any] = asdict(state.progress)
            if state.base_fingerprint is not None:
                run_state["base_fingerprint"] = state.base_fingerprint
            if job_id() is not None:  # slurm/job.sh counts a job's restarts by the checkpoints of its own
                run_state["job"] = job_id()
            (partial / "run_state.json").write_text(json.dumps(run_state))
    if is_rank0:
        remove_old(run_dir, config.checkpoint, state.progress.step)
    return final


def check_finite(named: Iterable[tuple[str, Tensor]], step: int) -> None:
    """Check weights before they are saved; every rank takes part.

    Raises:
        RunError: a value is not finite on some rank; names the tensor.
    """
    mine = next((name for name, tensor in named if not tensor.isfinite().all()), None)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found = [(rank, name) for rank, name in enumerate(everyone) if name is not None]
    if found:
        raise RunError(
            f"{found[0][1]} on rank {found[0][0]} is not finite after step {step}; nothing is saved, so resume from the "
            "last checkpoint with a smaller optimizer.learning_rate."
        )


def load_checkpoint(state: SavedState, checkpoint: CheckpointFolder) -> None:
    """Load a checkpoint into ``state``, whatever parallel layout it was saved under.

    Raises:
        UserError: it was trained on another frozen base.
    """
    progress = read_state(checkpoint.path)
    if progress.get("base_fingerprint") != state.base_fingerprint:
        raise UserError(
            f"The frozen weights of fine_tuning.base are not those that {checkpoint.path} was trained on "
            "(fingerprints differ); restore the original base."
        )
    sharded = state.sharded_state_dict(is_loading=True)
    with refusal(f"{checkpoint.path} cannot be loaded"):
        saved_keys = read_metadata(checkpoint.path).state_dict_metadata.keys()
    sharded["rng"] = {name: tensor for name, tensor in rng_state().items() if tensor.key in saved_keys}
    # A layer whose scales had no history, under another recipe, starts one.
    scales = sharded.get("fp8", {})
    sharded["fp8"] = {name: tensor for name, tensor in scales.items() if tensor.key in saved_keys}
    with refusal(f"{checkpoint.path} cannot be loaded"):
        loaded = dist_checkpointing.load(sharded, str(checkpoint.path))
    state.take_over(loaded)
    _load_rng(loaded.get("rng", {}))
    state.progress.step, state.progress.samples = progress["step"], progress["samples"]
    state.progress.skipped_steps = progress.get("skipped_steps", 0)  # checkpoints that don't say had none
    # Rank 0 says it: another host may still see what was there before the last of it was done.
    pending = [pending_of(checkpoint)]
    dist.broadcast_object_list(pending)
    state.progress.pending = pending[0]


def _load_rng(states: dict[str, Tensor]) -> None:
    states = {name: state.squeeze(0) for name, state in states.items()}
    if not states:
        return
    torch.set_rng_state(states.pop("default"))
    if "cuda" in states:
        torch.cuda.set_rng_state(states.pop("cuda"))
    tensor_parallel.get_cuda_rng_tracker().set_states(states)
