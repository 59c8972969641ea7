"""Rows of tables as pictures to pack: which columns have the picture and its caption, and what becomes of the others."""

import base64
import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from rmoe_megatron.data.captions import captions_of, is_list_of_captions
from rmoe_megatron.data.packing.arrow_tables import Unheld
from rmoe_megatron.data.packing.tables import Row, Table, read_table
from rmoe_megatron.data.shards.decoding import MAX_TEXT
from rmoe_megatron.errors import UserError
from rmoe_megatron.files.images import MAX_BYTES
from rmoe_megatron.files.regular import read_bytes

# Columns that are taken where none is named, if a table has one of them alone; the first of each is the default.
IMAGE_COLUMNS = ("image", "file_name", "img", "picture", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("caption", "text", "captions", "txt", "prompt", "description", "sentences")
URL_COLUMNS = ("url", "image_url", "img_url", "urls", "link")
# How the base64 of a JPEG, PNG, WebP or AVIF file begins.
BASE64 = re.compile(
    r"(?:data:image/[a-z+.-]+;base64,)?((?:/9j/|iVBORw0KGgo|UklGR|AAAA[A-Za-z0-9+/]{2}Z0eX)[A-Za-z0-9+/\s]+={0,2})\s*"
)
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://.*", re.DOTALL)
MAX_PATH = 4096  # bytes of Linux
INPUT_FORMATS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".parquet": "parquet"}  # of img2dataset


@dataclass(frozen=True)
class Picture:
    """A picture to pack.

    Attributes:
        name: what a message calls it.
        load: returns the bytes of its file, and what is beside it in its sample: extension -> value.
        files: what it is read from; some need not be there.
    """

    name: str
    load: Callable[[], tuple[bytes, dict[str, Any]]]
    files: tuple[Path, ...]


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
        with_several_captions: how many samples have their captions in their JSON, too, by the column's name.
        notes: what else there is to say of the source, sentences without a full stop.
    """

    samples: int = 0
    shards: int = 0
    left_out: list[tuple[str, str]] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    dropped_columns: dict[str, str] = field(default_factory=dict)
    with_several_captions: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Columns:
    """Of a table: where the picture is (its path, or its bytes), and where the caption.

    None is ``image`` and ``caption``, or another of the usual names if the table has a single one.
    """

    image: str | None = None
    caption: str | None = None


USUAL_COLUMNS = Columns()


def pictures_of_tables(tables: list[Path], columns: Columns, packed: Packed) -> tuple[int, Iterator[Picture]]:
    """Return how many rows the tables have, and the rows as pictures; ``packed`` is told what they lose.

    Raises:
        UserError: one cannot be read, it is not clear which columns are meant, or pictures are given by their URLs.
    """
    opened = [(path, read_table(path)) for path in tables]
    chosen = [choose_columns(path, table, columns) for path, table in opened if table.count]
    for image, caption in dict.fromkeys(chosen):
        if (columns.image, columns.caption) != (image, caption):
            packed.notes.append(
                f"the pictures are those of the column {image}, the captions those of {caption}"
            )
    return sum(table.count for _, table in opened), (
        _of_row(row, path, number, *choose_columns(path, table, columns), packed)
        for path, table in opened
        for number, row in enumerate(table.rows)
    )


def choose_columns(path: Path, table: Table, columns: Columns) -> tuple[str, str]:
    """Return the columns of a table that have the picture and its caption.

    Raises:
        UserError: there are none, or several that may be meant.
    """
    image = _choose(table.columns, columns.image, IMAGE_COLUMNS)
    caption = _choose(table.columns, columns.caption, CAPTION_COLUMNS)
    if image is None and columns.image is None:
        urls = [name for name in table.columns if name.lower() in URL_COLUMNS]
        if urls:
            raise UserError(_fetch_first(path, urls[0], caption))
    if image is None or caption is None:
        wanted = f"{columns.image or IMAGE_COLUMNS[0]} and {columns.caption or CAPTION_COLUMNS[0]}"
        raise UserError(
            f"{path} has the columns {', '.join(table.columns)}, but not {wanted}; name the columns with --image-column and "
            "--caption-column."
        )
    return image, caption


def _choose(names: list[str], asked: str | None, usual: tuple[str, ...]) -> str | None:
    """Return the column that is meant; None if there is none, or it is not clear."""
    if asked is not None:
        return asked if asked in names else None
    if usual[0] in names:
        return usual[0]
    found = [name for name in names if name.lower() in usual]
    return found[0] if len(found) == 1 else None


def fetch_command(urls: Path, url_column: str | None = None, caption_column: str | None = None) -> str:
    """Return the command that fetches the pictures of a list or table of URLs as they are."""
    command = [
        "img2dataset",
        "--url_list",
        str(urls),
        "--input_format",
        INPUT_FORMATS.get(urls.suffix, "txt"),
    ]
    if url_column is not None:
        command += ["--url_col", url_column]
    if caption_column is not None:
        command += ["--caption_col", caption_column]
    folder = f"{urls.stem}_pictures"
    command += ["--output_format", "webdataset", "--output_folder", folder, "--resize_mode", "no"]
    return shlex.join(command)


def _fetch_first(path: Path, url_column: str, caption_column: str | None) -> str:
    return (
        f"{path} names pictures by their URLs, in the column {url_column}; fetch them first with "
        f"`{fetch_command(path, url_column, caption_column)}` (pip install img2dataset): a set that it has written needs no packing."
    )


def _of_row(
    row: Row, table: Path, number: int, image_column: str, caption_column: str, packed: Packed
) -> Picture:
    name = f"row {number} of {table.name}"
    if isinstance(row, str):
        return Picture(name, partial(refuse, row), (table,))
    image, value = row.get(image_column), row.get(caption_column)
    if isinstance(image, dict):  # as the Hugging Face hub has them
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        raise UserError(_fetch_first(table, image_column, caption_column))
    if image is None and row.get("status") not in (None, "success"):  # of img2dataset
        reason = f"it could not be fetched: {row['status']}, {row.get('error_message')}"
        return Picture(name, partial(refuse, reason), (table,))
    captions = captions_of(value)
    if not captions:
        return Picture(name, partial(refuse, _why_no_caption(value)), (table,))
    if max(map(len, captions)) > MAX_TEXT["txt"]:
        reason = f"its caption has more than {MAX_TEXT['txt']} characters"
        return Picture(name, partial(refuse, reason), (table,))
    members: dict[str, Any] = {"txt": captions[0]}
    others = _others(row, {image_column, caption_column}, packed)
    if len(captions) > 1:
        packed.with_several_captions[caption_column] += 1
    if is_list_of_captions(value):  # of one, too: json:COLUMN then finds the caption of every sample
        others[caption_column] = captions
    if others:
        members["json"] = others
    return Picture(name, lambda: (_content(image, table.parent), members), (table, *_files_of(image, table)))


def _files_of(image: Any, table: Path) -> list[Path]:
    """Return the file that a picture of a table lies in, if it is given by its path."""
    if not isinstance(image, str) or BASE64.fullmatch(image):
        return []
    try:
        return [_path_of(image, table.parent)]
    except ValueError:  # which is said when the picture is loaded
        return []


def _others(row: dict[str, Any], taken: set[str], packed: Packed) -> dict[str, Any]:
    """Return what goes into the JSON of a sample."""
    others = {}
    for key, found in row.items():
        value = _plain(found)
        if key in taken or value is None:
            continue
        if _is_json(value):
            others[key] = value
        else:
            kind = value.kind if isinstance(value, Unheld) else type(value).__name__
            packed.dropped_columns.setdefault(key, kind)
    return others


def _plain(value: Any) -> Any:
    """Return a value of a table with numbers in the place of decimals, which JSON does not have."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return value


def refuse(reason: str) -> tuple[bytes, dict[str, Any]]:
    """Say why a picture cannot be read.

    Raises:
        ValueError: always.
    """
    raise ValueError(reason)


def _why_no_caption(value: Any) -> str:
    if value is None:
        return "it has no caption"
    if isinstance(value, str | list | dict) and not value or isinstance(value, str) and not value.strip():
        return "its caption is empty"
    return f"its caption is neither text, nor a list of texts, nor an object with one: {str(value)[:60]}"


def _content(image: Any, folder: Path) -> bytes:
    """Return the bytes of a picture given by its path, as bytes, or as the base64 of these."""
    if image is None:
        raise ValueError("it has no picture")
    if isinstance(image, str):
        if encoded := BASE64.fullmatch(image):
            return base64.b64decode(encoded[1])
        return read_bytes(_path_of(image, folder), MAX_BYTES, follow=True)
    if not isinstance(image, bytes):
        raise ValueError(f"a picture is bytes or a path, not {type(image).__name__}")
    return image


def _path_of(image: str, folder: Path) -> Path:
    """Return the path of a picture that a table names, which may be written as on Windows, or as a URL of this machine."""
    if len(image) > MAX_PATH:
        raise ValueError(f"it is named by a text of {len(image)} characters, which is no path")
    if image.startswith("file://"):
        return Path(unquote(urlsplit(image).path))
    if URL.fullmatch(image):
        raise ValueError(f"it lies at {image}; copy it to this machine, and give its path there")
    spellings = (image, image.strip(), image.strip().replace("\\", "/"))
    return next((path for each in spellings if (path := folder / each).exists()), folder / image)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
