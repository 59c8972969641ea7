"""Where the samples of a run lie; imports nothing that takes time, so that a folder that is not there is said at once."""

from pathlib import Path

from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.config.stages import Stage, stages_of
from rmoe_megatron.data.storage.block_cache import BlockCache
from rmoe_megatron.data.storage.remote_store import shard_store
from rmoe_megatron.data.storage.store import LocalStore, ShardStore


def check_shards(config: RunConfig) -> None:
    """Check that the shard folders of every stage are there.

    Raises:
        UserError: one is not, or has no shards.
    """
    for stage in stages_of(config):
        for folder in folders_of(config, stage):
            folder.shards()


def check_local_shards(config: RunConfig) -> None:
    """Check the shard folders of this machine alone, which takes no time; see :func:`check_shards`."""
    for stage in stages_of(config):
        for folder in folders_of(config, stage):
            if isinstance(folder, LocalStore):
                folder.shards()


def folders_of(config: RunConfig, stage: Stage) -> list[ShardStore]:
    """Return the shard folders of a stage."""
    names = [*(dataset.path for dataset in stage.datasets), *filter(None, [stage.validation])]
    return [store_of(config, name) for name in names]


def store_of(config: RunConfig, location: str) -> ShardStore:
    """Return the store of a folder or URL; what is remote goes through the run's cache."""
    data, cache = config.data, None
    if data.cache is not None:
        cache = BlockCache(Path(data.cache), int(data.cache_gigabytes * 1e9))
    return shard_store(location, cache)
