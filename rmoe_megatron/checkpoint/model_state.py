"""The model's tensors as Megatron-Core's dist_checkpointing (torch_dist) sees them: which rank holds which part of what."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from rmoe_megatron.checkpoint.unpickling import EXTRA_STATE
from rmoe_megatron.checkpoint.weights import RunWeights
from rmoe_megatron.errors import UserError
from rmoe_megatron.files.foreign_errors import refusal


def full_state(chunks: nn.ModuleList) -> ShardedStateDict:
    """Return the sharded state dict of all of this rank's model chunks; keys are those of the whole model."""
    metadata = {"dp_cp_group": _data_parallel_group()}
    state = {}
    for number, chunk in enumerate(chunks):
        assert isinstance(chunk, MegatronModule)
        for name, entry in chunk.sharded_state_dict(metadata=metadata).items():
            # Layers may pickle what they call their extra state, and unpickle it when it comes back.
            is_object = isinstance(entry, ShardedObject)
            state[f"{number}.{name}"] = replace(entry, data=None) if is_object else entry
    return state


def without_objects(state: ShardedStateDict) -> ShardedStateDict:
    """Return the tensors of a state: nothing else of a checkpoint reaches a layer."""
    return {name: entry for name, entry in state.items() if not isinstance(entry, ShardedObject)}


def take_tensors(chunks: nn.ModuleList, tensors: dict[str, Tensor], is_whole: bool) -> None:
    """Give tensors of a checkpoint to the model.

    Args:
        is_whole: they are all that the model has, not the trained ones alone.

    Raises:
        UserError: one is missing, or the model has no such tensor.
    """
    found = chunks.load_state_dict(tensors, strict=False)
    missing = [name for name in found.missing_keys if not name.endswith(EXTRA_STATE)]
    if is_whole and (missing or found.unexpected_keys):
        raise UserError(
            f"The checkpoint does not hold the tensors of this model ({(missing + found.unexpected_keys)[0]} is in one of them "
            "alone); resume with the configuration that it was saved with."
        )


def model_state(chunks: nn.ModuleList) -> ShardedStateDict:
    """Return what a checkpoint stores of the model: everything, or of a partly frozen one the trained parameters."""
    state = full_state(chunks)
    trained = {name for name, parameter in chunks.named_parameters() if parameter.requires_grad}
    if len(trained) == len(list(chunks.parameters())):
        return state
    return {name: sharded for name, sharded in state.items() if name in trained}


def averages_state(model: ShardedStateDict, averages: dict[str, Tensor]) -> ShardedStateDict:
    """Return the averages of parameters sharded as these are in :func:`model_state`, under keys that start with ``ema.``."""
    return {
        name: replace(sharded, key=f"ema.{sharded.key}", data=averages[name], dtype=torch.float32)
        for name, sharded in model.items()
        if name in averages
    }


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
        with refusal(f"{reader.path} cannot be loaded"):
            loaded = dist_checkpointing.load(part, str(reader.path))
        chunks.load_state_dict({name: loaded[name] for name in part}, strict=False)


def _data_parallel_group() -> dist.ProcessGroup:
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group(with_context_parallel=True)
