"""What a checkpoint holds, saved and loaded by Megatron-Core's dist_checkpointing (torch_dist)."""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from rmoe_megatron.checkpoint.folders import (
    CheckpointFolder,
    checkpoint_path,
    publish,
    read_state,
    remove_old,
)
from rmoe_megatron.checkpoint.saving import save_sharded
from rmoe_megatron.checkpoint.weights import RunWeights
from rmoe_megatron.config.loading import save_config
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.errors import RunFailure, UserError
from rmoe_megatron.training.ema import ExponentialMovingAverage

# Megatron-Core's format that can be loaded under any other parallel layout.
OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass
class Progress:
    """Where a run is: optimizer steps done and samples drawn; the data order is a function of the latter.

    ``skipped_steps`` counts the steps that left the weights alone because a loss or gradient was not finite.
    """

    step: int = 0
    samples: int = 0
    skipped_steps: int = 0


@dataclass
class TrainingState:
    """Everything that changes while training."""

    chunks: nn.ModuleList  # of DiffusionTransformer: what this rank has of the model
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    ema: ExponentialMovingAverage
    progress: Progress
    base_fingerprint: str | None = None  # of the frozen weights, which checkpoints leave out

    def sharded_state_dict(self, is_loading: bool) -> dict[str, Any]:
        """Describe the state to dist_checkpointing; with ``is_loading`` it names where loaded values go."""
        model = model_state(self.chunks)
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=OPTIMIZER_FORMAT)
        return {
            "model": model,
            "ema": ema_state(self.chunks, self.ema.averages),
            "optimizer": optimizer,
            "scheduler": self.scheduler.state_dict(),
            "rng": rng_state(),
        }


def full_state(chunks: nn.ModuleList) -> ShardedStateDict:
    """Return the sharded state dict of all of this rank's model chunks; keys are those of the whole model."""
    metadata = {"dp_cp_group": _data_parallel_group()}
    state = {}
    for number, chunk in enumerate(chunks):
        assert isinstance(chunk, MegatronModule)
        for name, entry in chunk.sharded_state_dict(metadata=metadata).items():
            state[f"{number}.{name}"] = entry
    return state


def model_state(chunks: nn.ModuleList) -> ShardedStateDict:
    """Return what a checkpoint stores of the model: everything, or of a partly frozen one the trained parameters."""
    state = full_state(chunks)
    trained = {name for name, parameter in chunks.named_parameters() if parameter.requires_grad}
    if len(trained) == len(list(chunks.parameters())):
        return state
    return {name: sharded for name, sharded in state.items() if name in trained}


def ema_state(chunks: nn.ModuleList, averages: dict[str, Tensor]) -> ShardedStateDict:
    """Return the averages sharded as the parameters they average, under keys that start with ``ema.``."""
    return {
        name: replace(sharded, key=f"ema.{sharded.key}", data=averages[name], dtype=torch.float32)
        for name, sharded in model_state(chunks).items()
        if name in averages
    }


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


def save_checkpoint(state: TrainingState, config: RunConfig, run_dir: Path) -> Path:
    """Save the state under ``run_dir`` and return the published folder; every rank takes part.

    Raises:
        RunFailure: weights or averages are not finite; nothing is published and nothing removed.
    """
    check_finite([*state.chunks.named_parameters(), *state.ema.averages.items()], state.progress.step)
    _create_adam_state(state.optimizer)  # all steps may have been left out
    final = checkpoint_path(run_dir, state.progress.step)
    partial = final.with_name(final.name + ".partial")
    is_rank0 = dist.get_rank() == 0
    if is_rank0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    save_sharded(state.sharded_state_dict(is_loading=False), partial)
    if is_rank0:
        save_config(config, partial / "config.yaml")
        run_state: dict[str, int | str] = asdict(state.progress)
        if state.base_fingerprint is not None:
            run_state["base_fingerprint"] = state.base_fingerprint
        (partial / "run_state.json").write_text(json.dumps(run_state))
        publish(partial, final)
        remove_old(run_dir, config.checkpoint.keep_last)
    dist.barrier()
    return final


def check_finite(named: Iterable[tuple[str, Tensor]], step: int) -> None:
    """Check weights before they are saved; every rank takes part.

    Raises:
        RunFailure: a value is not finite on some rank; names the tensor.
    """
    mine = next((name for name, tensor in named if not tensor.isfinite().all()), None)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found = [(rank, name) for rank, name in enumerate(everyone) if name is not None]
    if found:
        raise RunFailure(
            f"{found[0][1]} on rank {found[0][0]} is not finite after step {step}; nothing is saved, so resume from the "
            "last checkpoint with a smaller optimizer.learning_rate."
        )


def load_checkpoint(state: TrainingState, checkpoint: CheckpointFolder) -> None:
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
    _create_adam_state(state.optimizer)
    sharded = state.sharded_state_dict(is_loading=True)
    saved_keys = dist_checkpointing.load_tensors_metadata(str(checkpoint.path)).keys()
    sharded["rng"] = {name: tensor for name, tensor in sharded["rng"].items() if tensor.key in saved_keys}
    loaded = dist_checkpointing.load(sharded, str(checkpoint.path))
    state.chunks.load_state_dict(loaded["model"], strict=state.base_fingerprint is None)
    _load_optimizer(state.optimizer, loaded["optimizer"], loaded["scheduler"])
    for adam in _adam_optimizers(state.optimizer):
        for values in adam.state.values():
            # Megatron-Core gives all parameters the same counter, which each of them would then advance.
            values["step"] = values["step"].clone()
    state.scheduler.load_state_dict(loaded["scheduler"])
    for name, average in loaded["ema"].items():
        state.ema.averages[name].copy_(average)
    _load_rng(loaded.get("rng", {}))
    state.progress.step, state.progress.samples = progress["step"], progress["samples"]
    state.progress.skipped_steps = progress.get("skipped_steps", 0)  # checkpoints that don't say had none


def _load_optimizer(optimizer: MegatronOptimizer, saved: dict[str, Any], scheduler: dict[str, Any]) -> None:
    """Load moments and counters; learning rates, betas and eps stay those of the configuration."""
    configured = [
        {name: group[name] for name in ("max_lr", "min_lr", "betas", "eps") if name in group}
        for group in optimizer.param_groups
    ]
    for group in optimizer.param_groups:
        # Megatron-Core finds a group's saved counterpart by these.
        group.update({name: scheduler[name] for name in ("max_lr", "min_lr")})
    optimizer.load_state_dict(saved)
    for group, values in zip(optimizer.param_groups, configured, strict=True):
        group.update(values)


def load_weights(chunks: nn.ModuleList, weights: RunWeights, fresh: Callable[[str], bool]) -> None:
    """Load weights into a model of any parallel layout.

    Args:
        fresh: whether a parameter of this name may be missing and keeps its initial value.

    Raises:
        UserError: another weight is missing.
    """
    wanted = {name: entry for name, entry in full_state(chunks).items() if isinstance(entry, ShardedTensor)}
    keys_wanted = [entry.key for entry in wanted.values()]
    missing = [key for key in keys_wanted if key not in weights.locations and not fresh(key)]
    if missing:
        raise UserError(
            f"{weights.checkpoint.path} lacks {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; "
            "its model is another one."
        )
    for reader, keys in weights.by_reader():
        part = {
            name: replace(entry, key=keys[entry.key]) for name, entry in wanted.items() if entry.key in keys
        }
        loaded = dist_checkpointing.load(part, str(reader.path))
        chunks.load_state_dict({name: loaded[name] for name in part}, strict=False)


def _create_adam_state(optimizer: MegatronOptimizer) -> None:
    """Give PyTorch's Adam the state it makes at its first update: Megatron-Core saves and loads what is there."""
    for adam in _adam_optimizers(optimizer):
        for group in adam.param_groups:
            for parameter in group["params"]:
                if parameter not in adam.state:
                    adam.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def _adam_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    return [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]


def _load_rng(states: dict[str, Tensor]) -> None:
    states = {name: state.squeeze(0) for name, state in states.items()}
    if not states:
        return
    torch.set_rng_state(states.pop("default"))
    if "cuda" in states:
        torch.cuda.set_rng_state(states.pop("cuda"))
    tensor_parallel.get_cuda_rng_tracker().set_states(states)


def _data_parallel_group() -> dist.ProcessGroup:
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group(with_context_parallel=True)
