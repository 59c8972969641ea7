"""Pictures with captions, in a folder or named by a table, into WebDataset shards: ``rmoe data pack``."""

import json
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rmoe_megatron.data.packing.folders import SIDECARS, find_pictures
from rmoe_megatron.data.packing.progress import (
    PicturesSeen,
    begin_anew,
    going_on,
    read_done,
    shard_path,
    write_done,
)
from rmoe_megatron.data.packing.rows import USUAL_COLUMNS, Columns, Packed, Picture
from rmoe_megatron.data.shards.decoding import decode_image
from rmoe_megatron.data.shards.index import IMAGES
from rmoe_megatron.data.shards.writer import open_shard
from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic

LEFT_OUT = "left_out.jsonl"
BESIDE = "not_taken.jsonl"


def pack(
    source: Path,
    out: Path,
    columns: Columns = USUAL_COLUMNS,
    samples_per_shard: int = 10_000,
    progress: Callable[[int, int], None] | None = None,
    split: str | None = None,
) -> Packed:
    """Write the pictures of ``source`` as shards into the new folder ``out``, which appears whole or not at all.

    The files of pictures are copied as they are. Where they may come from: :func:`~rmoe_megatron.data.packing.folders.find_pictures`. Where the
    caption is a list, the first is the sample's text and all of them are in its JSON, for ``data.captions: [json:COLUMN]`` to draw one.
    What is no picture that training takes, or has no caption, is left out and named, also in ``left_out.jsonl`` beside the shards;
    the other files of a folder are named in ``not_taken.jsonl``.
    Shards that the same command has finished before it was ended are kept, unless a picture of theirs has changed since.

    Args:
        split: which of a source's splits to pack (``train``); ``all`` packs them together.

    Raises:
        UserError: there is nothing to pack, a table is none, it is not clear what is meant, or ``out`` is not empty.
    """
    atomic.require_empty(out, "The output")
    count, pictures, packed = _find(source, columns, split)
    with going_on(out) as building:
        seen, done = PicturesSeen(columns, samples_per_shard, split), read_done(building)
        if done is not None and seen.are_those_of(done, pictures):
            packed.shards, packed.samples = done["shards"], done["samples"]
            packed.left_out = [(name, reason) for name, reason in done["left_out"]]
        else:
            begin_anew(building)
            if done is not None:
                seen = PicturesSeen(columns, samples_per_shard, split)
                count, pictures, packed = _find(source, columns, split)
                packed.notes.append(
                    "the shards of a command that was ended are of other pictures or settings; all was packed anew"
                )
        samples = _samples(pictures, packed, seen, progress and (lambda done: progress(done, count)))
        while (first := next(samples, None)) is not None:
            with open_shard(shard_path(building, packed.shards)) as write:
                for sample in chain([first], islice(samples, samples_per_shard - 1)):
                    write(f"{packed.samples:09d}", sample)
                    packed.samples += 1
            packed.shards += 1
            write_done(building, packed, seen)
        if not packed.samples:
            name, reason = packed.left_out[0]
            raise UserError(f"None of the {count} pictures in {source} can be used ({name}: {reason}).")
        lines = [json.dumps({"name": name, "reason": reason}) for name, reason in packed.left_out]
        atomic.write(building / LEFT_OUT, "".join(f"{line}\n" for line in lines))
        if packed.beside:
            names = [json.dumps({"name": name}) for name in packed.beside]
            atomic.write(building / BESIDE, "".join(f"{line}\n" for line in names))
    return packed


def _find(source: Path, columns: Columns, split: str | None) -> tuple[int, Iterator[Picture], Packed]:
    """Return how many pictures there are, the pictures, and what is known of the source before any is read.

    Raises:
        UserError: there are none.
    """
    packed = Packed()
    count, pictures = find_pictures(source, columns, packed, split)
    if not count:
        raise UserError(
            f"There are no pictures in {source} ({', '.join(IMAGES)}); name a folder or table that has some."
        )
    return count, pictures, packed


def _samples(
    pictures: Iterator[Picture], packed: Packed, seen: PicturesSeen, progress: Callable[[int], None] | None
) -> Iterator[dict[str, Any]]:
    """Yield the members of what can be used; the rest is told to ``packed``."""
    for picture in pictures:
        seen.add(picture)
        try:
            content, members = picture.load()
            decode_image(content)
            if not any(name in members for name in SIDECARS):
                raise ValueError("it has no caption")
        except Exception as error:  # on damaged content the libraries raise nearly anything
            packed.left_out.append((picture.name, str(error).splitlines()[0] if str(error) else repr(error)))
        else:
            yield {_extension(content): content, **members}
        if progress is not None:
            progress(seen.count)


def _extension(content: bytes) -> str:
    """Return the extension of a picture's format, whatever its file was called."""
    if content.startswith(b"\xff\xd8"):
        return "jpg"
    if content.startswith(b"\x89PNG"):
        return "png"
    return "webp" if content.startswith(b"RIFF") else "avif"
