"""Writes a checkpoint in Megatron-Core's torch_dist format: published whole, and in the calling process alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemWriter

from rmoe_megatron import durable
from rmoe_megatron.checkpoint.folders import write_manifest


class _Writer(FileSystemWriter):
    @property
    def checkpoint_id(self) -> str:
        """The folder as it is written into ``.metadata``: text, for checkpoints hold no other objects than they must."""
        return str(self.path)


class _SynchronousStrategy(TorchDistSaveShardedStrategy):
    """Megatron-Core's strategy with PyTorch's writer.

    Megatron-Core's own writer is made for saving in the background: also when it saves at once, it hands its results
    over in a queue that a process of its own holds, which takes 560 MB and outlives a run that is killed.
    """

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        checkpoint.save(
            mcore_to_pyt_state_dict(by_key),
            storage_writer=_Writer(checkpoint_dir),
            planner=MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        )


@contextmanager
def new_checkpoint(final: Path, before_publishing: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Write the checkpoint folder ``final``, which is there whole or not at all; every rank takes part.

    Args:
        before_publishing: called by rank 0 when all is written; if it raises nothing is published.

    Yields:
        Where to write. When all ranks leave the context, rank 0 adds the manifest and publishes the folder.
    """
    if dist.get_rank() > 0:
        dist.barrier()
        yield durable.unfinished(final)
        dist.barrier()
    else:
        with durable.building(final, replace=True) as partial:  # a damaged one of the same step gives way
            dist.barrier()
            yield partial
            write_manifest(partial)
            before_publishing()
        dist.barrier()


def save_sharded(sharded_state_dict: ShardedStateDict, folder: Path) -> None:
    """Write a sharded state dict into the empty ``folder``; every rank takes part, and none starts a process."""
    dist_checkpointing.save(sharded_state_dict, str(folder), _SynchronousStrategy())
