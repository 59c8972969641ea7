"""Makes the index of a folder of shards, and keeps it up to date: what has not changed is not read again."""

import hashlib
import io
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context

import numpy as np

from rmoe_megatron.config.sample_filter import SampleFilter
from rmoe_megatron.data.shards.index import (
    INDEX,
    Index,
    IndexedShard,
    IndexWriter,
    filter_text,
    parse_index,
    read_index,
)
from rmoe_megatron.data.shards.scan import scan_shard
from rmoe_megatron.data.storage.store import ShardStore, StoredShard
from rmoe_megatron.files import atomic

logger = logging.getLogger(__name__)


def index_shards(
    store: ShardStore, shards: list[StoredShard], sample_filter: SampleFilter | None = None
) -> Index:
    """Scan some shards; nothing is written.

    Args:
        sample_filter: samples that it does not take get :data:`~rmoe_megatron.data.shards.index.LEFT_OUT` among the members of their kind.

    Raises:
        UserError: a shard cannot be read.
    """
    content = io.BytesIO()
    writer = IndexWriter(content, sample_filter)
    for shard in shards:
        writer.add(*scan_shard(store, sample_filter, shard))
        _warn_of_damage(store, writer.shards[-1])
    writer.finish()
    return parse_index(np.frombuffer(content.getbuffer(), np.uint8), str(store), sample_filter)


def open_index(store: ShardStore, sample_filter: SampleFilter | None = None, processes: int = 1) -> Index:
    """Map the index of a store, which is made or brought up to date first; every filter has an index of its own.

    That of a remote store is copied from beside the shards where it is not here, and put there when it was made.

    Args:
        processes: that scan shards at the same time, if there are some to scan.

    Raises:
        UserError: the folder is missing or has no shards, or one cannot be read.
    """
    shards = store.shards()
    index = _read_if_there(store, sample_filter)
    if index is None or not _is_current(index, shards):
        name = index_name(sample_filter)
        if store.fetch(name, store.index_paths(name)[0]):
            index = _read_if_there(store, sample_filter)
    if index is None or not _is_current(index, shards):
        return build_index(store, sample_filter, processes)
    for shard in index.shards:
        _warn_of_damage(store, shard)
    return index


def build_index(
    store: ShardStore,
    sample_filter: SampleFilter | None = None,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Index:
    """Make the index of a store, or bring it up to date: shards that are as they were are not read.

    Args:
        processes: that scan shards at the same time.
        progress: called with (shards done, shards in total).

    Raises:
        UserError: the folder is missing or has no shards, or one cannot be read.
    """
    shards, old = store.shards(), _read_if_there(store, sample_filter)
    for path in store.index_paths(index_name(sample_filter)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic.writing(path) as unfinished, unfinished.open("wb") as file:
                writer = IndexWriter(file, sample_filter)
                for done, _ in enumerate(_scanned(store, shards, old, processes, writer)):
                    _warn_of_damage(store, writer.shards[-1])
                    if progress is not None:
                        progress(done + 1, len(shards))
                writer.finish()
        except OSError as error:  # a shard that cannot be read is a UserError
            why = error.strerror
        else:
            store.publish(path, index_name(sample_filter))
            return read_index(path, str(store), sample_filter)
    logger.warning("The index of %s cannot be written (%s); every start scans the shards.", store, why)
    return index_shards(store, shards, sample_filter)


def _scanned(
    store: ShardStore, shards: list[StoredShard], old: Index | None, processes: int, writer: IndexWriter
) -> Iterator[None]:
    """Add the shards to ``writer``, one a step: those that are as in ``old`` from there."""
    known = {} if old is None else _known(old)
    is_known = {shard: known.get(shard.name, (None,))[0] == shard for shard in shards}
    pool = ProcessPoolExecutor(processes, get_context("spawn")) if processes > 1 else nullcontext()
    with pool as executor:
        each = map if executor is None else executor.map
        scan_one = partial(scan_shard, store, writer.filter)
        scanned = each(scan_one, [shard for shard in shards if not is_known[shard]])
        for shard in shards:
            if old is not None and is_known[shard]:
                _, first, entry = known[shard.name]
                kinds = [tuple(kind.members) for kind in old.kinds]
                records, pieces = old.shard_part(first, entry.samples)
                writer.add(entry, records, kinds, pieces)
            else:
                writer.add(*next(scanned))
            yield


def _is_current(index: Index, shards: list[StoredShard]) -> bool:
    return [(shard.name, shard.size, shard.modified) for shard in index.shards] == shards


def _known(index: Index) -> dict[str, tuple[StoredShard, int, IndexedShard]]:
    """Return every shard as it was, its first record and its entry."""
    firsts = np.cumsum([0, *(shard.samples for shard in index.shards)]).tolist()
    return {
        shard.name: (StoredShard(shard.name, shard.size, shard.modified), first, shard)
        for shard, first in zip(index.shards, firsts, strict=False)
    }


def _warn_of_damage(store: ShardStore, shard: IndexedShard) -> None:
    if shard.damage:
        logger.warning(
            "Shard %s is damaged (%s); the %d samples found are used.",
            store.path(shard.name),
            shard.damage,
            shard.samples,
        )


def index_name(sample_filter: SampleFilter | None = None) -> str:
    """Return the name of the file of an index."""
    text = filter_text(sample_filter)
    return INDEX + (f"-{hashlib.sha256(text.encode()).hexdigest()[:16]}" if text else "")


def _read_if_there(store: ShardStore, sample_filter: SampleFilter | None) -> Index | None:
    """Map the index of a store; None if there is none, or one that is not what it says, which is told."""
    for path in store.index_paths(index_name(sample_filter)):
        if path.is_file():
            try:
                return read_index(path, str(store), sample_filter)
            except (OSError, ValueError) as error:
                logger.warning("The index %s cannot be used (%s); it is made anew.", path, error)
    return None
