"""The samples of one shard for the index: what each has, where it lies, how large its picture is, and whether a filter takes it."""

import io
import json
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from rmoe_megatron.config.sample_filter import SampleFilter
from rmoe_megatron.data.shards.archive import Piece, scan
from rmoe_megatron.data.shards.index import (
    IMAGES,
    LATENTS,
    LEFT_OUT,
    MAX_PIECES,
    MEMBERS,
    NO_SAMPLES,
    OTHER_IMAGES,
    PIECE,
    RECORD,
    IndexedShard,
)
from rmoe_megatron.data.storage.range_file import RangeFile
from rmoe_megatron.data.storage.store import ShardStore, StoredShard
from rmoe_megatron.errors import UserError
from rmoe_megatron.files.images import FORMATS

NOTED = {*MEMBERS, *OTHER_IMAGES}
ORIENTATION = 0x0112  # of EXIF
MAX_SIZE = 1 << 32  # bytes of a piece
SIZES = {"caption_bytes", "width", "height", "aspect_ratio"}  # what a filter may ask without the JSON


class ScannedShard(NamedTuple):
    """What an index holds of a shard.

    Attributes:
        records: one of ``RECORD`` a sample; they number ``kinds`` and ``pieces``.
        kinds: extensions of a sample's members.
        pieces: the pieces of the samples whose members do not lie side by side.
    """

    entry: IndexedShard
    records: np.ndarray
    kinds: list[tuple[str, ...]]
    pieces: np.ndarray


@dataclass(slots=True)
class _Sample:
    """A sample, as far as its pieces have been found.

    Attributes:
        extents: offset and size of each piece.
        members: extensions that training may use.
        size: width and height of the latents or the picture.
        caption: bytes of the text.
        described: what its JSON says that a filter asks for.
    """

    extents: list[tuple[int, int]] = field(default_factory=list)
    members: tuple[str, ...] = ()
    size: tuple[int, int] = (0, 0)
    caption: int = 0
    described: dict[str, Any] = field(default_factory=dict)

    def values(self) -> dict[str, object]:
        """Return what a filter may ask of the sample."""
        sizes: dict[str, object] = {"caption_bytes": self.caption}
        width, height = self.size
        if width and height:
            sizes |= {"width": width, "height": height, "aspect_ratio": width / height}
        return self.described | sizes


def scan_shard(store: ShardStore, sample_filter: SampleFilter | None, shard: StoredShard) -> ScannedShard:
    """Read the headers of a shard, and those of its pictures.

    Args:
        sample_filter: samples that it does not take get :data:`LEFT_OUT` among their members.

    Raises:
        UserError: the shard cannot be read.
    """
    damage = list[str]()
    try:
        with store.open(shard.name) as file:
            samples = _samples(file, damage, sample_filter)
    except OSError as error:
        raise UserError(
            f"The shard {store.path(shard.name)} cannot be read ({error.strerror}); remove or replace it."
        ) from error
    if not samples:
        damage.append(NO_SAMPLES)
    more = f"; {len(damage) - 3} more" if len(damage) > 3 else ""
    entry = IndexedShard(shard.name, shard.size, shard.modified, len(samples), "; ".join(damage[:3]) + more)
    kinds: dict[tuple[str, ...], int] = {}
    pieces, rows = list[tuple[int, int, int]](), []
    for sample in samples:
        (offset, size), count = sample.extents[0], 0
        if len(sample.extents) > 1:
            offset, size, count = len(pieces), 0, len(sample.extents)
            pieces += [(*extent, 0) for extent in sample.extents]
        names = sample.members
        if sample_filter is not None and not sample_filter.takes(sample.values()):
            names = (*names, LEFT_OUT)
        kind = kinds.setdefault(names, len(kinds))
        rows.append((offset, size, 0, *sample.size, sample.caption, kind, count))
    return ScannedShard(entry, np.array(rows, RECORD), list(kinds), np.array(pieces, PIECE))


def _samples(file: BinaryIO, damage: list[str], sample_filter: SampleFilter | None) -> list[_Sample]:
    """Put the pieces of a shard together to samples, in the order of their first pieces.

    A piece belongs to the last sample of its key that has none of its extensions.
    """
    samples, latest = list[_Sample](), dict[str, _Sample]()
    for piece in scan(file, damage):
        names = tuple(name for name in piece.members if name.rsplit(".", 1)[-1] in NOTED)
        if not names:
            continue
        if piece.size >= MAX_SIZE:
            damage.append(f"the sample {piece.key} has more than 4 GiB")
            continue
        sample = latest.get(piece.key)
        if sample is None or not set(names).isdisjoint(sample.members) or len(sample.extents) == MAX_PIECES:
            sample = latest[piece.key] = _Sample()
            samples.append(sample)
        sample.extents.append((piece.offset, piece.size))
        sample.members += names
        if "txt" in names:
            sample.caption = piece.members["txt"][1]
        measured = next((name for name in (LATENTS, *IMAGES) if name in sample.members), None)
        if measured in names:
            sample.size = _image_size(file, piece, measured)
        if sample_filter is not None and "json" in names:
            sample.described = _described(file, piece, sample_filter.names)
    return samples


def _image_size(file: BinaryIO, piece: Piece, name: str) -> tuple[int, int]:
    """Return width and height of the latents or the image that are a member, (0, 0) if its header cannot be read."""
    offset, size = piece.members[name]
    try:
        content = io.BufferedReader(RangeFile(partial(_read_at, file, offset), size), 1 << 13)
        if name == LATENTS:
            if np.lib.format.read_magic(content) != (1, 0):
                return 0, 0
            height, width = np.lib.format.read_array_header_1_0(content)[0][-2:]
        else:
            with Image.open(content, formats=FORMATS) as image:
                width, height = image.size
                # Of what comes before the pixels: PNG's own method would decode them to see what comes behind.
                if Image.Image.getexif(image).get(ORIENTATION) in (5, 6, 7, 8):
                    width, height = height, width  # a camera on its side
        return (width, height) if min(width, height) >= 0 and max(width, height) < 1 << 32 else (0, 0)
    except (
        Exception
    ):  # on damaged content the libraries raise nearly anything; reading the sample will say it
        return 0, 0


def _read_at(file: BinaryIO, start: int, offset: int, size: int) -> bytes:
    file.seek(start + offset)
    return file.read(size)


def _described(file: BinaryIO, piece: Piece, wanted: set[str]) -> dict[str, Any]:
    """Return those values of a sample's JSON that are wanted; it is read only if there may be some."""
    if wanted <= SIZES:
        return {}
    offset, size = piece.members["json"]
    try:
        described = json.loads(_read_at(file, offset, 0, size))
    except (ValueError, RecursionError):  # reading the sample will say it, if it is taken
        return {}
    return (
        {name: described[name] for name in wanted & described.keys()} if isinstance(described, dict) else {}
    )
