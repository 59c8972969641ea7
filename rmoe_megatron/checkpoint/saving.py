"""Writes a checkpoint in Megatron-Core's torch_dist format: published whole, and in the calling process alone."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
from torch.distributed.checkpoint import FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from rmoe_megatron.checkpoint.folders import write_manifest
from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic
from rmoe_megatron.files.disk_errors import about, sentence


class _Writer(FileSystemWriter):
    @property
    def checkpoint_id(self) -> str:
        """The folder as it is written into ``.metadata``: text, for checkpoints hold no other objects than they must."""
        return str(self.path)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's part; what the system refuses is raised, not what PyTorch's archive says of it then."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            refused = _refused(error)
            if refused is not None:
                raise refused from error
            raise


def _refused(error: BaseException | None) -> OSError | None:
    """Return the error of the system that another one came of."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


class _SynchronousStrategy(TorchDistSaveShardedStrategy):
    """Megatron-Core's strategy with PyTorch's writer.

    Megatron-Core's own writer is made for saving in the background: also when it saves at once, it hands its results
    over in a queue that a process of its own holds, which takes 560 MB and outlives a run that is killed.
    """

    has_saved = False

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        checkpoint.save(
            mcore_to_pyt_state_dict(by_key),
            storage_writer=_Writer(checkpoint_dir),
            planner=MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        )
        self.has_saved = True


class NotSavedError(UserError):
    """A checkpoint could not be written; those that were there before are whole. Raised on all ranks."""


@contextmanager
def new_checkpoint(
    final: Path,
    before_publishing: Callable[[], None] = lambda: None,
    replace: bool = True,
    size: int | None = None,
) -> Iterator[Path]:
    """Write the checkpoint folder ``final``, which is there whole or not at all; every rank takes part.

    Args:
        before_publishing: called by rank 0 when all is written; if it raises nothing is published.
        replace: there may be a damaged one of the same step, which gives way.
        size: its bytes, if they are known, for the message on a full disk.

    Yields:
        Where to write. When all ranks leave the context, rank 0 adds the manifest and publishes the folder.

    Raises:
        NotSavedError: the system has refused to write something, on whatever rank.
    """
    with ExitStack() as stack:
        partials: list[Path | None] = [None]
        with _raised_on_all_ranks(final, size):
            if dist.get_rank() == 0:
                partials = [stack.enter_context(atomic.building(final, replace))]
        dist.broadcast_object_list(partials)
        partial = partials[0]
        assert partial is not None
        with _raised_on_all_ranks(final, size, partial):
            yield partial
        with _raised_on_all_ranks(final, size):
            if dist.get_rank() == 0:
                write_manifest(partial)
                before_publishing()
                stack.close()  # which gives it its name


@contextmanager
def _raised_on_all_ranks(final: Path, size: int | None, partial: Path | None = None) -> Iterator[None]:
    """Raise on all ranks what the system refuses to one; every rank takes part."""
    failure: OSError | None = None
    try:
        with about(final, partial or atomic.own_partial(final), size):
            try:
                yield
            except CheckpointException as error:  # PyTorch's, which says on all ranks what each met
                refused = {
                    rank: each for rank, (each, _) in error.failures.items() if isinstance(each, OSError)
                }
                if not refused:
                    raise
                if dist.get_rank() in refused:
                    raise refused[dist.get_rank()] from error
    except OSError as error:
        failure = error
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, None if failure is None else sentence(failure))
    found = [(rank, said) for rank, said in enumerate(everyone) if said is not None]
    if found:
        rank, said = found[0]
        raise NotSavedError(f"{final} is not saved (rank {rank}): {said}") from failure


def save_sharded(sharded_state_dict: ShardedStateDict, folder: Path) -> None:
    """Write a sharded state dict into the empty ``folder``; every rank takes part, and none starts a process."""
    strategy = _SynchronousStrategy()
    try:
        dist_checkpointing.save(sharded_state_dict, str(folder), strategy)
    except OSError:
        if strategy.has_saved:  # rank 0 alone writes one more file, for which the others wait
            dist.barrier()
        raise
