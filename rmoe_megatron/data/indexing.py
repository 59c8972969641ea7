"""Makes the index of a folder of shards, and keeps it up to date: what has not changed is not read again."""

import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from typing import BinaryIO

import numpy as np
from PIL import Image

from rmoe_megatron import durable
from rmoe_megatron.config.sample_filter import SampleFilter
from rmoe_megatron.data.archive import ArchiveSample, scan
from rmoe_megatron.data.index import (
    FORMATS,
    IMAGES,
    INDEX,
    LATENTS,
    LEFT_OUT,
    MEMBERS,
    RECORD,
    Index,
    IndexedShard,
    IndexWriter,
    filter_text,
    parse_index,
    read_index,
)
from rmoe_megatron.data.range_file import RangeFile
from rmoe_megatron.data.store import ShardStore, StoredShard
from rmoe_megatron.errors import UserError

logger = logging.getLogger(__name__)

ORIENTATION = 0x0112  # of EXIF


def index_shards(
    store: ShardStore, shards: list[StoredShard], sample_filter: SampleFilter | None = None
) -> Index:
    """Scan some shards; nothing is written.

    Args:
        sample_filter: samples that it does not take get :data:`LEFT_OUT` among the members of their kind.

    Raises:
        UserError: a shard cannot be read.
    """
    content = io.BytesIO()
    writer = IndexWriter(content, sample_filter)
    for shard in shards:
        writer.add(*_scan(store, sample_filter, shard))
        _warn_of_damage(store, writer.shards[-1])
    writer.finish()
    return parse_index(np.frombuffer(content.getbuffer(), np.uint8), str(store), sample_filter)


def open_index(store: ShardStore, sample_filter: SampleFilter | None = None) -> Index:
    """Map the index of a store, which is made or brought up to date first; every filter has an index of its own.

    That of a remote store is copied from beside the shards where it is not here, and put there when it was made.

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
        return build_index(store, sample_filter)
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
            with durable.writing(path) as unfinished, unfinished.open("wb") as file:
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
        scan_one = partial(_scan, store, writer.filter)
        scanned = each(scan_one, [shard for shard in shards if not is_known[shard]])
        for shard in shards:
            if old is not None and is_known[shard]:
                _, first, entry = known[shard.name]
                kinds = [tuple(kind.members) for kind in old.kinds]
                writer.add(entry, old.records[first : first + entry.samples].copy(), kinds)
            else:
                writer.add(*next(scanned))
            yield


def _scan(
    store: ShardStore, sample_filter: SampleFilter | None, shard: StoredShard
) -> tuple[IndexedShard, np.ndarray, list[tuple[str, ...]]]:
    """Return a shard's entry, its records, and the kinds that they number."""
    kinds: dict[tuple[str, ...], int] = {}
    rows, damage = [], list[str]()
    try:
        with store.open(shard.name) as file:
            for sample in scan(file, damage):
                names = tuple(name for name in sample.members if name.rsplit(".", 1)[-1] in MEMBERS)
                if names and sample.size < 1 << 32:
                    width, height = _image_size(file, sample)
                    caption = sample.members.get("txt", (0, 0))[1]
                    if sample_filter is not None and not sample_filter.takes(
                        _values(file, sample, width, height, sample_filter.names)
                    ):
                        names = (*names, LEFT_OUT)
                    kind = kinds.setdefault(names, len(kinds))
                    rows.append((sample.offset, sample.size, 0, width, height, caption, kind, 0))
    except OSError as error:
        raise UserError(
            f"The shard {store.path(shard.name)} cannot be read ({error.strerror}); remove or replace it."
        ) from error
    if not rows:
        damage.append("it holds no samples")
    more = f"; {len(damage) - 3} more" if len(damage) > 3 else ""
    entry = IndexedShard(shard.name, shard.size, shard.modified, len(rows), "; ".join(damage[:3]) + more)
    return entry, np.array(rows, dtype=RECORD), list(kinds)


def _image_size(file: BinaryIO, sample: ArchiveSample) -> tuple[int, int]:
    """Return width and height of a sample's latents or image as its header says, (0, 0) if it cannot be read."""
    name = next((name for name in (LATENTS, *IMAGES) if name in sample.members), None)
    if name is None:
        return 0, 0
    offset, size = sample.members[name]
    try:
        content = io.BufferedReader(RangeFile(partial(_read_at, file, offset), size), 1 << 13)
        if name == LATENTS:
            if np.lib.format.read_magic(content) != (1, 0):
                return 0, 0
            height, width = np.lib.format.read_array_header_1_0(content)[0][-2:]
        else:
            with Image.open(content, formats=FORMATS) as image:
                width, height = image.size
                if image.format != "PNG" and image.getexif().get(ORIENTATION) in (5, 6, 7, 8):
                    width, height = height, width  # a camera on its side; PNG would be decoded for it
        return (width, height) if min(width, height) >= 0 and max(width, height) < 1 << 32 else (0, 0)
    except (
        Exception
    ):  # on damaged content the libraries raise nearly anything; reading the sample will say it
        return 0, 0


def _read_at(file: BinaryIO, start: int, offset: int, size: int) -> bytes:
    file.seek(start + offset)
    return file.read(size)


def _values(
    file: BinaryIO, sample: ArchiveSample, width: int, height: int, wanted: set[str]
) -> dict[str, object]:
    """Return what a filter may ask of a sample: sizes, and the values of its JSON, which is read if it asks for others."""
    sizes: dict[str, object] = {"caption_bytes": sample.members.get("txt", (0, 0))[1]}
    if width and height:
        sizes |= {"width": width, "height": height, "aspect_ratio": width / height}
    if "json" not in sample.members or wanted <= sizes.keys():
        return sizes
    offset, size = sample.members["json"]
    try:
        described = json.loads(_read_at(file, offset, 0, size))
    except (ValueError, RecursionError):  # reading the sample will say it, if it is taken
        return sizes
    return described | sizes if isinstance(described, dict) else sizes


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
