"""Pictures with captions, in a folder or named by a table, into WebDataset shards: ``rmoe data pack``."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rmoe_megatron import durable
from rmoe_megatron.data.captions import captions_of
from rmoe_megatron.data.decoding import MAX_TEXT, decode_image
from rmoe_megatron.data.index import IMAGES, OTHER_IMAGES
from rmoe_megatron.data.shard_writer import open_shard
from rmoe_megatron.data.tables import READERS, Row, read_table
from rmoe_megatron.errors import UserError
from rmoe_megatron.pictures import MAX_BYTES
from rmoe_megatron.regular_files import read_bytes

SIDECARS = ("txt", "caption", "json")
LEFT_OUT = "left_out.jsonl"
TABLES = tuple(READERS)


@dataclass(frozen=True)
class Picture:
    """A picture to pack.

    Attributes:
        name: what a message calls it.
        load: returns the bytes of its file, and what is beside it in its sample: extension -> value.
    """

    name: str
    load: Callable[[], tuple[bytes, dict[str, Any]]]


@dataclass
class Packed:
    """What was packed.

    Attributes:
        samples: how many.
        shards: how many.
        left_out: name and reason of every picture that was not.
        beside: other files of the folder, that were not looked at.
        dropped_columns: the names of table columns some of whose values JSON cannot hold, each with the type of
            these values. The samples lack them.
        with_several_captions: samples whose captions are in their JSON, too, under the column's name.
    """

    samples: int = 0
    shards: int = 0
    left_out: list[tuple[str, str]] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    dropped_columns: dict[str, str] = field(default_factory=dict)
    with_several_captions: int = 0


@dataclass(frozen=True)
class Columns:
    """Of a table: where the picture is (its path, or its bytes), and where the caption."""

    image: str = "image"
    caption: str = "caption"


def pack(
    source: Path,
    out: Path,
    columns: Columns = Columns(),
    samples_per_shard: int = 10_000,
    progress: Callable[[int, int], None] | None = None,
) -> Packed:
    """Write the pictures of ``source`` as shards into the new folder ``out``, which appears whole or not at all.

    The files of pictures are copied as they are. A folder's pictures have their captions beside them (``a.jpg`` and ``a.txt``,
    ``a.caption`` or ``a.json``); a table (CSV, TSV, JSON lines, or Parquet as the Hugging Face hub has it, in one file or a folder of them)
    has a column with the picture's path, relative to the table, or its bytes, one with the caption; its other columns go into
    the JSON of the sample. Where the caption is a list, the first is the sample's text and all of them are in its JSON, for
    ``data.captions: [json:COLUMN]`` to draw one. What is no picture that training takes, or has no caption, is left out and named, also in
    ``left_out.jsonl`` beside the shards.

    Raises:
        UserError: there is nothing to pack, a table is none, or ``out`` is not empty.
    """
    durable.require_empty(out, "The output")
    packed = Packed()
    count, pictures = _pictures(source, columns, packed)
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


def _pictures(source: Path, columns: Columns, packed: Packed) -> tuple[int, Iterator[Picture]]:
    """Return how many pictures there are, and the pictures; ``packed`` is told what lies beside them."""
    if source.is_file() and source.suffix in TABLES:
        return _of_tables([source], columns, packed)
    if not source.is_dir():
        raise UserError(f"{source} is neither a folder nor a table ({', '.join(TABLES)}); name one.")
    every = sorted(path for path in source.rglob("*") if not path.is_dir())
    # What a picture is, its content says; one of another format is left out by name.
    files = [path for path in every if path.suffix[1:].lower() in (*IMAGES, *OTHER_IMAGES)]
    tables = [path for path in every if path.suffix == ".parquet"]
    taken = {*files, *(path.with_suffix(f".{name}") for path in files for name in SIDECARS)}
    if tables and not files:
        taken = set(tables)
    packed.beside = [str(path.relative_to(source)) for path in every if path not in taken]
    if tables and not files:
        return _of_tables(tables, columns, packed)
    return len(files), (
        Picture(str(path.relative_to(source)), partial(_load_file, path, source)) for path in files
    )


def _load_file(path: Path, source: Path) -> tuple[bytes, dict[str, Any]]:
    return read_bytes(path, MAX_BYTES, within=source), _sidecars(path, source)


def _sidecars(path: Path, source: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for extension in SIDECARS:
        beside = path.with_suffix(f".{extension}")
        if os.path.lexists(beside):
            text = read_bytes(beside, MAX_TEXT[extension], within=source).decode("utf-8-sig")
            if extension == "json":
                found[extension] = json.loads(text)
            elif captions := captions_of(text):
                found[extension] = captions[0]
    if not found and any(os.path.lexists(path.with_suffix(f".{extension}")) for extension in SIDECARS):
        raise ValueError("its caption is empty")
    return found


def _of_tables(tables: list[Path], columns: Columns, packed: Packed) -> tuple[int, Iterator[Picture]]:
    readers = [read_table(table) for table in tables]
    pictures = (
        _of_row(row, table, number, columns, packed)
        for table, (_, rows) in zip(tables, readers, strict=True)
        for number, row in enumerate(rows)
    )
    return sum(count for count, _ in readers), pictures


def _of_row(row: Row, table: Path, number: int, columns: Columns, packed: Packed) -> Picture:
    name = f"row {number} of {table.name}"
    if isinstance(row, str):
        return Picture(name, partial(_refuse, row))
    if columns.image not in row or columns.caption not in row:
        raise UserError(
            f"{table} has the columns {', '.join(map(str, row))}, but not {columns.image} and {columns.caption}; name the "
            "columns with --image-column and --caption-column."
        )
    image, value = row[columns.image], row[columns.caption]
    captions = captions_of(value)
    if not captions:
        return Picture(name, partial(_refuse, _why_no_caption(value)))
    others = {}
    for key, other in row.items():
        if key in (columns.image, columns.caption) or other is None:
            continue
        if _is_json(other):
            others[key] = other
        else:
            packed.dropped_columns.setdefault(key, type(other).__name__)
    if max(map(len, captions)) > MAX_TEXT["txt"]:
        return Picture(name, partial(_refuse, f"its caption has more than {MAX_TEXT['txt']} characters"))
    members: dict[str, Any] = {"txt": captions[0]}
    if len(captions) > 1:
        packed.with_several_captions += 1
        others[columns.caption] = captions
    if others:
        members["json"] = others
    return Picture(name, lambda: (_image_content(image, table.parent), members))


def _refuse(reason: str) -> tuple[bytes, dict[str, Any]]:
    raise ValueError(reason)


def _why_no_caption(value: Any) -> str:
    if value is None:
        return "it has no caption"
    if isinstance(value, str | list | dict) and not value or isinstance(value, str) and not value.strip():
        return "its caption is empty"
    return f"its caption is neither text, nor a list of texts, nor an object with one: {str(value)[:60]}"


def _image_content(image: Any, folder: Path) -> bytes:
    """Return the bytes of a picture given by its path, its bytes, or as the Hugging Face hub does by a dictionary of both."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str):
        return read_bytes(folder / image, MAX_BYTES, follow=True)
    if not isinstance(image, bytes):
        raise ValueError(f"a picture is bytes or a path, not {type(image).__name__}")
    return image


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
