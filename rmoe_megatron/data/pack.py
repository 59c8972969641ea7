"""Pictures with captions, in a folder or named by a table, into WebDataset shards: ``rmoe data pack``."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rmoe_megatron import durable
from rmoe_megatron.data.decoding import decode_image
from rmoe_megatron.data.index import IMAGES
from rmoe_megatron.data.pack_folders import SIDECARS, find_pictures
from rmoe_megatron.data.pack_rows import USUAL_COLUMNS, Columns, Packed, Picture
from rmoe_megatron.data.shard_writer import open_shard
from rmoe_megatron.errors import UserError

LEFT_OUT = "left_out.jsonl"


def pack(
    source: Path,
    out: Path,
    columns: Columns = USUAL_COLUMNS,
    samples_per_shard: int = 10_000,
    progress: Callable[[int, int], None] | None = None,
    split: str | None = None,
) -> Packed:
    """Write the pictures of ``source`` as shards into the new folder ``out``, which appears whole or not at all.

    The files of pictures are copied as they are. Where they may come from: :func:`~rmoe_megatron.data.pack_folders.find_pictures`. Where the
    caption is a list, the first is the sample's text and all of them are in its JSON, for ``data.captions: [json:COLUMN]`` to draw one.
    What is no picture that training takes, or has no caption, is left out and named, also in ``left_out.jsonl`` beside the shards.

    Args:
        split: which of a source's splits to pack (``train``); ``all`` packs them together.

    Raises:
        UserError: there is nothing to pack, a table is none, it is not clear what is meant, or ``out`` is not empty.
    """
    durable.require_empty(out, "The output")
    packed = Packed()
    count, pictures = find_pictures(source, columns, packed, split)
    if not count:
        raise UserError(
            f"There are no pictures in {source} ({', '.join(IMAGES)}); name a folder or table that has some."
        )
    with durable.building(out) as building:
        waiting = _samples(
            pictures, packed, lambda done: progress(done, count) if progress is not None else None
        )
        first = next(waiting, None)
        while first is not None:
            with open_shard(building / f"{packed.shards:06d}.tar") as write:
                for _ in range(samples_per_shard):
                    if first is None:
                        break
                    write(f"{packed.samples:09d}", first)
                    packed.samples += 1
                    first = next(waiting, None)
            packed.shards += 1
        if not packed.samples:
            name, reason = packed.left_out[0]
            raise UserError(f"None of the {count} pictures in {source} can be used ({name}: {reason}).")
        lines = [json.dumps({"name": name, "reason": reason}) for name, reason in packed.left_out]
        (building / LEFT_OUT).write_text("".join(f"{line}\n" for line in lines))
    return packed


def _samples(
    pictures: Iterator[Picture], packed: Packed, progress: Callable[[int], None]
) -> Iterator[dict[str, Any]]:
    """Yield the members of what can be used; the rest is told to ``packed``."""
    for done, picture in enumerate(pictures):
        try:
            content, members = picture.load()
            decode_image(content)
            if not any(name in members for name in SIDECARS):
                raise ValueError("it has no caption")
        except Exception as error:  # on damaged content the libraries raise nearly anything
            packed.left_out.append((picture.name, str(error).splitlines()[0] if str(error) else repr(error)))
        else:
            yield {_extension(content): content, **members}
        progress(done + 1)


def _extension(content: bytes) -> str:
    """Return the extension of a picture's format, whatever its file was called."""
    if content.startswith(b"\xff\xd8"):
        return "jpg"
    if content.startswith(b"\x89PNG"):
        return "png"
    return "webp" if content.startswith(b"RIFF") else "avif"
