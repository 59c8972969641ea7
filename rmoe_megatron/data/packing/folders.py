"""Where the pictures to pack are: a table, a folder of pictures, a data set as the Hugging Face libraries or img2dataset save it, shards."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from rmoe_megatron.data.captions import captions_of
from rmoe_megatron.data.packing.rows import (
    Columns,
    Packed,
    Picture,
    choose_columns,
    fetch_command,
    pictures_of_tables,
)
from rmoe_megatron.data.packing.tables import READERS, is_table, read_table
from rmoe_megatron.data.shards.archive import is_litter
from rmoe_megatron.data.shards.dataset import ShardDataset
from rmoe_megatron.data.shards.decoding import DECODERS, MAX_TEXT, decode_text
from rmoe_megatron.data.shards.index import IMAGES, LATENTS, OTHER_IMAGES
from rmoe_megatron.errors import UserError
from rmoe_megatron.files.images import MAX_BYTES
from rmoe_megatron.files.regular import open_regular, read_bytes
from rmoe_megatron.files.untrusted import read_json

SIDECARS = ("txt", "caption", "json")
TABLES = tuple(READERS)
OF_DATASETS = (".parquet", ".arrow")  # tables that hold the pictures themselves
SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
ALL = "all"
_UNPACK = "is compressed; unpack it first"
# Of files by their extension: what to do to have a source.
WHY_NO_SOURCE = {
    **dict.fromkeys((".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar"), _UNPACK),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "is a workbook; save the sheet as CSV UTF-8"),
    ".json": "is one JSON value; a table has an object a line (`jq -c '.[]' a.json > a.jsonl` makes one of a list of objects)",
    ".npz": "holds arrays of numpy; write a table with a column of pictures",
    ".h5": "is an HDF5 file; write a table with a column of pictures",
    ".db": "is a database; write a table with a column of pictures",
    ".lmdb": "is a database; write a table with a column of pictures",
}
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # of an imagefolder
FILE_NAME = "file_name"  # its column
STATE, DATASET_DICT = "state.json", "dataset_dict.json"  # of save_to_disk
STATISTICS = re.compile(r"\d+_stats\.json")  # of a shard of img2dataset
SHARD_TABLE = re.compile(r"\d+\.parquet")  # likewise

_OBJECT = TypeAdapter(dict[str, Any])


def find_pictures(
    source: Path, columns: Columns, packed: Packed, split: str | None = None
) -> tuple[int, Iterator[Picture]]:
    """Return how many pictures a source has, and the pictures; ``packed`` is told what lies beside them.

    A source is one of these; its subfolders belong to it:

    - a table (CSV, TSV, JSON lines, Parquet, Arrow) with a column of pictures, as paths relative to it or as bytes, one of captions;
      the others go into the JSON of the sample;
    - a folder of pictures with their captions beside them (``a.jpg`` and ``a.txt``, ``a.caption`` or ``a.json``), or in a ``metadata.csv``,
      ``metadata.jsonl`` or ``metadata.parquet`` with a column ``file_name`` (an imagefolder);
    - a data set that ``save_to_disk`` has written, or a folder of Parquet or Arrow files;
    - a folder of tar shards, which are packed anew.

    What img2dataset writes is one of the last three.

    Args:
        split: the split that is taken of a source that has several; ``all`` takes all of them.

    Raises:
        UserError: it is none of these, has several splits, or a part of it cannot be read.
    """
    if split not in (None, ALL) and (source.is_file() or (source / STATE).is_file()):
        raise UserError(f"{source} has no splits; leave --split out.")
    if source.is_file():
        return _of_file(source, columns, packed)
    if not source.is_dir():
        raise UserError(f"{source} is neither a folder nor a table ({', '.join(TABLES)}); name one.")
    if (source / DATASET_DICT).is_file():
        return _of_saved_splits(source, columns, packed, split)
    if (source / STATE).is_file():
        return _of_saved(source, columns, packed)
    return _of_folder(source, columns, packed, split)


def _of_file(source: Path, columns: Columns, packed: Packed) -> tuple[int, Iterator[Picture]]:
    if is_table(source):
        return pictures_of_tables([source], columns, packed)
    if source.suffix == ".tar":
        raise UserError(f"{source} is a shard; name the folder that it lies in.")
    if (reason := WHY_NO_SOURCE.get(source.suffix.lower())) is not None:
        raise UserError(f"{source} {reason}.")
    beginning = _beginning(source)
    if beginning.startswith(("http://", "https://")):
        raise UserError(
            f"{source} is a list of URLs; fetch the pictures first with `{fetch_command(source)}` (pip install img2dataset): a "
            "set that it has written needs no packing. A list alone has no captions: a table with a column of them has."
        )
    raise UserError(f"{source} is neither a folder nor a table ({', '.join(TABLES)}); name one.")


def _beginning(path: Path) -> str:
    with open_regular(path) as file:
        return file.read(4096).decode("utf-8-sig", "replace").lstrip()


def _of_saved_splits(
    source: Path, columns: Columns, packed: Packed, split: str | None
) -> tuple[int, Iterator[Picture]]:
    """Return the pictures of a DatasetDict that save_to_disk has written."""
    splits = read_json(source / DATASET_DICT, _OBJECT).get("splits")
    if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
        raise UserError(f"{source / DATASET_DICT} has no list of splits; save the data set again.")
    chosen = splits if split == ALL else [_one_of(source, splits, split)]
    parts = []
    for name in chosen:
        if name in ("", ".", "..") or "/" in name or not (source / name / STATE).is_file():
            raise UserError(f"{source} lacks its split {name}; save the data set again.")
        parts.append(_of_saved(source / name, columns, packed))
    return sum(count for count, _ in parts), (picture for _, pictures in parts for picture in pictures)


def _one_of(source: Path, splits: list[str], split: str | None) -> str:
    """Return the split that is meant.

    Raises:
        UserError: it is none of ``splits``, or there are several and none is asked for.
    """
    if split is not None and split not in splits:
        raise UserError(f"{source} has no split {split}; it has {', '.join(splits) or 'none'}.")
    if split is None and len(splits) > 1:
        raise UserError(
            f"{source} has the splits {', '.join(splits)}; choose one with --split, or take them together with --split {ALL}."
        )
    return split if split is not None else splits[0]


def _of_saved(source: Path, columns: Columns, packed: Packed) -> tuple[int, Iterator[Picture]]:
    """Return the pictures of a Dataset that save_to_disk has written: Arrow files, in an order of their own."""
    state = read_json(source / STATE, _OBJECT)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(
            f"{source} was saved with a selection of its rows beside them; save it again after `dataset.flatten_indices()`."
        )
    described = state.get("_data_files")
    names = [each.get("filename") for each in described or () if isinstance(each, dict)]
    if not names:
        raise UserError(f"{source / STATE} names no data files; save the data set again.")
    tables = []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (source / name).is_file():
            raise UserError(f"{source} lacks its data file {str(name)[:60]}; save the data set again.")
        tables.append(source / name)
    return pictures_of_tables(tables, columns, packed)


def _of_folder(
    source: Path, columns: Columns, packed: Packed, split: str | None
) -> tuple[int, Iterator[Picture]]:
    every = sorted(path for path in source.rglob("*") if not path.is_dir())
    # What a picture is, its content says; one of another format is left out by name.
    files = [path for path in every if path.suffix[1:].lower() in (*IMAGES, *OTHER_IMAGES)]
    files = [path for path in files if not is_litter(path.relative_to(source).as_posix())]
    shards = [path for path in every if path.suffix == ".tar"]
    metadata = [path for path in every if path.name in METADATA]
    tables = [path for path in every if path.suffix in OF_DATASETS and path not in metadata]
    taken = files or shards or tables
    if not taken:
        _require_something(source, every)
    splits = list(dict.fromkeys(name for path in taken if (name := _split_of(path, source)) is not None))
    if split != ALL and (split is not None or len(splits) > 1):
        chosen = _one_of(source, splits, split)
        every = [path for path in every if _split_of(path, source) in (chosen, None)]
        taken = [path for path in taken if _split_of(path, source) == chosen]
        metadata = [path for path in metadata if _split_of(path, source) in (chosen, None)]
    known = {*taken, *_of_img2dataset(every, packed)}
    known |= {path for path in every if path.name in ("dataset_info.json", ".rmoe_index")}
    described = _described(metadata, columns) if files else {}
    others = [path for path in taken if os.path.normpath(path) not in set().union(*described.values())]
    if files:
        known |= {*described, *(beside for path in others for _, beside in _places_beside(path))}
    packed.beside = [str(path.relative_to(source)) for path in every if path not in known]
    if files:
        count, pictures = pictures_of_tables(list(described), columns, packed)
        return count + len(others), chain(pictures, _of_files(source, others))
    if shards:
        return _of_shards(source, taken)
    return pictures_of_tables(taken, columns, packed)


def _require_something(source: Path, every: list[Path]) -> None:
    """Say what a folder without pictures, shards and tables of pictures holds instead.

    Raises:
        UserError: it holds something that a source can be made of.
    """
    for path in every:
        if path.suffix.lower() in WHY_NO_SOURCE and path.name not in ("dataset_info.json", "dataset.json"):
            raise UserError(
                f"There are no pictures in {source}; {path.relative_to(source)} {WHY_NO_SOURCE[path.suffix.lower()]}."
            )
        if is_table(path):
            raise UserError(
                f"There are no pictures in {source}; to take those that {path} names, give this path."
            )


def _split_of(path: Path, source: Path) -> str | None:
    """Return the split that a file belongs to by its place or its name, as the Hugging Face libraries see it."""
    places = path.relative_to(source).parts
    first = next((place for place in places[:-1] if place.lower() in SPLITS), None)
    if first is not None or path.suffix not in OF_DATASETS:
        return first
    return next((word for word in re.split(r"[-_.]", path.stem) if word.lower() in SPLITS), None)


def _of_img2dataset(every: list[Path], packed: Packed) -> list[Path]:
    """Return the tables and statistics that img2dataset has put beside its pictures; says what it could not fetch."""
    statistics = [path for path in every if STATISTICS.fullmatch(path.name)]
    if not statistics:
        return []
    counts = Counter[str]()
    for path in statistics:
        counts.update({
            key: value for key, value in read_json(path, _OBJECT, allow_infinite=True).items() if isinstance(value, int)
        })  # fmt: skip
    packed.notes.append(
        f"img2dataset was asked for {counts['count']} pictures and has fetched {counts['successes']}: {counts['failed_to_download']} "
        f"failed to download, {counts['failed_to_resize']} to resize"
    )
    return [*statistics, *(path for path in every if SHARD_TABLE.fullmatch(path.name))]


def _described(metadata: list[Path], columns: Columns) -> dict[Path, set[str]]:
    """Return the tables beside pictures that describe some, and which."""
    described = {}
    for path in metadata:
        table = read_table(path)
        if (columns.image or FILE_NAME) in table.columns and table.count:
            image, _ = choose_columns(path, table, columns)
            names = (row.get(image) for row in table.rows if not isinstance(row, str))
            described[path] = {
                os.path.normpath(path.parent / name) for name in names if isinstance(name, str)
            }
    return described


def _of_files(source: Path, files: list[Path]) -> Iterator[Picture]:
    return (
        Picture(
            str(path.relative_to(source)),
            partial(_load_file, path, source),
            (path, *(beside for _, beside in _places_beside(path))),
        )
        for path in files
    )


def _load_file(path: Path, source: Path) -> tuple[bytes, dict[str, Any]]:
    return read_bytes(path, MAX_BYTES, within=source), _sidecars(path, source)


def _places_beside(path: Path) -> Iterator[tuple[str, Path]]:
    """Yield where captions of a picture may lie, with their kinds; Windows does not tell capitals from small letters."""
    for extension in SIDECARS:
        yield extension, path.with_suffix(f".{extension}")
        yield extension, path.with_suffix(f".{extension.upper()}")


def _sidecars(path: Path, source: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    there = [(extension, beside) for extension, beside in _places_beside(path) if os.path.lexists(beside)]
    for extension, beside in there:
        if extension in found:
            continue
        try:
            text = decode_text(read_bytes(beside, MAX_TEXT[extension], within=source))
        except ValueError as error:
            raise ValueError(f"of {beside.name}: {error}") from error
        if extension == "json":
            found[extension] = _object_of(text, beside)
        elif captions := captions_of(text):
            found[extension] = captions[0]
    if there and not found:
        raise ValueError("its caption is empty")
    return found


def _object_of(text: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds no object, whose values have names")
    return value


def _of_shards(source: Path, shards: list[Path]) -> tuple[int, Iterator[Picture]]:
    """Return the pictures of tar shards, whose members need not lie side by side."""
    sets = [(folder, ShardDataset(folder)) for folder in dict.fromkeys(shard.parent for shard in shards)]
    for folder, samples in sets:
        if any(LATENTS in kind.members for kind in samples.index.kinds):
            raise UserError(
                f"{folder} holds precomputed samples; pack the raw shards that they were made from."
            )
    return sum(len(samples) for _, samples in sets), (
        Picture(
            _name_in(samples, index, source),
            partial(_load_sample, samples, index),
            (Path(samples.shard(index)),),
        )
        for _, samples in sets
        for index in range(len(samples))
    )


def _name_in(samples: ShardDataset, index: int, source: Path) -> str:
    return f"{Path(samples.shard(index)).relative_to(source)}/{samples.name(index)}"


def _load_sample(samples: ShardDataset, index: int) -> tuple[bytes, dict[str, Any]]:
    _, contents = samples.contents(index)
    picture = next((name for name in IMAGES if name in contents), None)
    if picture is None:
        raise ValueError("it has no picture")
    beside = {name: DECODERS[name](bytes(contents[name])) for name in (*SIDECARS, "cls") if name in contents}
    texts = [name for name in ("txt", "caption") if name in beside]
    if texts and "json" not in beside and not any(beside[name].strip() for name in texts):
        raise ValueError("its caption is empty")
    return bytes(contents[picture]), beside
