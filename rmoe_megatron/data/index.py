"""One file per data set that says where every sample lies; mapped into memory, so that a start costs the same for any size.

The file ``.rmoe_index`` lies in the folder of the shards, or in the user's cache where that cannot be written. It is made when
it is missing; when shards have come, gone or changed, only those are scanned again. One record of 32 bytes a sample is followed
by the numbers of samples of each kind in every block of records (so the n-th sample of some kinds is found without a list of
them), by a description in JSON (the shards, the kinds of samples, both with their counts) and by the length of that.
"""

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import numpy as np
from PIL import Image
from pydantic import Field, TypeAdapter, ValidationError

from rmoe_megatron import durable
from rmoe_megatron.config.sample_filter import SampleFilter
from rmoe_megatron.data.archive import ArchiveSample, scan
from rmoe_megatron.errors import UserError

logger = logging.getLogger(__name__)

INDEX = ".rmoe_index"
MEMBERS = (
    "png",
    "jpg",
    "jpeg",
    "webp",
    "txt",
    "caption",
    "json",
    "cls",
    "npy",
)  # by the last part of an extension; others are passed over
IMAGES = ("png", "jpg", "jpeg", "webp")
LATENTS = "latents.npy"
LEFT_OUT = "left out by the filter"  # stands among the members of such samples
BLOCK = 4096  # records
MAX_KINDS = 256
RECORD = np.dtype(
    [
        ("offset", "<u8"),  # of the sample's first header, in its shard
        ("size", "<u4"),  # bytes from there to the end of its last member
        ("shard", "<u4"),
        ("width", "<u4"),  # of the image or the latents; 0 if it cannot be told
        ("height", "<u4"),
        ("caption", "<u4"),  # bytes of the .txt member
        ("kind", "<u2"),
        ("reserved", "<u2"),
    ]
)
assert RECORD.itemsize == 32
_MAGIC = b"rmoe_megatron index 1\n".ljust(RECORD.itemsize)


Count = Annotated[int, Field(ge=0, lt=1 << 48)]


@dataclass(frozen=True)
class IndexedShard:
    """A shard as it was when it was scanned.

    Attributes:
        size: in bytes.
        modified: nanoseconds since 1970.
        samples: how many were found.
        damage: where it is damaged; empty for a sound shard.
    """

    name: str
    size: Count
    modified: int
    samples: Count
    damage: str


@dataclass(frozen=True)
class Kind:
    """The extensions of a sample's members, in their order, and how many samples have them."""

    members: list[str]
    samples: Count


@dataclass(frozen=True)
class _Description:
    version: Literal[1]
    shards: list[IndexedShard]
    kinds: Annotated[list[Kind], Field(max_length=MAX_KINDS)]
    filter: str  # empty if there is none


_DESCRIPTION = TypeAdapter(_Description)


@dataclass(frozen=True)
class Index:
    """The samples of a folder's shards, in the order of the shards' names and of the samples in them.

    Attributes:
        folder: of the shards.
        records: one of ``RECORD`` a sample, [samples].
        block_counts: samples of each kind in each block of ``BLOCK`` records, uint16 [blocks, kinds].
    """

    folder: Path
    shards: list[IndexedShard]
    kinds: list[Kind]
    records: np.ndarray
    block_counts: np.ndarray

    def __len__(self) -> int:
        return len(self.records)


class Selection:
    """The samples of some kinds of an index, by their number; holds 8 bytes for ``BLOCK`` of them.

    Args:
        is_wanted: takes the extensions of a sample's members.
    """

    def __init__(self, index: Index, is_wanted: Callable[[set[str]], bool]) -> None:
        self.index = index
        self.is_wanted = np.array([is_wanted(set(kind.members)) for kind in index.kinds], dtype=bool)
        counts = index.block_counts[:, self.is_wanted].sum(axis=1, dtype=np.int64)
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, number: int) -> int:
        """Return the place of the ``number``-th wanted sample in the index."""
        if len(self) == len(self.index):
            return number
        block = int(np.searchsorted(self._ends, number, side="right"))
        before = int(self._ends[block - 1]) if block else 0
        kinds = self.index.records["kind"][block * BLOCK : (block + 1) * BLOCK]
        return block * BLOCK + int(np.flatnonzero(self.is_wanted[kinds])[number - before])


def list_shards(folder: Path) -> list[Path]:
    """Return the tar shards of a folder by name.

    Raises:
        UserError: the folder is missing or has no shards.
    """
    if not folder.is_dir():
        raise UserError(
            f"There is no shard folder {folder}; point the data setting at a folder of .tar shards."
        )
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise UserError(f"The folder {folder} has no .tar shards; build or download the data first.")
    return shards


def index_shards(folder: Path, shards: list[Path], sample_filter: SampleFilter | None = None) -> Index:
    """Scan some shards of a folder; nothing is written.

    Args:
        sample_filter: samples that it does not take get :data:`LEFT_OUT` among the members of their kind.

    Raises:
        UserError: a shard cannot be read.
    """
    content = io.BytesIO()
    writer = IndexWriter(content, sample_filter)
    for shard in shards:
        writer.add(*_scan(shard, sample_filter))
        _warn_of_damage(folder, writer.shards[-1])
    writer.finish()
    return _parse(np.frombuffer(content.getbuffer(), np.uint8), folder, sample_filter)


def open_index(folder: Path, sample_filter: SampleFilter | None = None) -> Index:
    """Map the index of a folder, which is made or brought up to date first; every filter has an index of its own.

    Raises:
        UserError: the folder is missing or has no shards, or one cannot be read.
    """
    shards = list_shards(folder)
    index = _read_if_there(folder, sample_filter)
    if index is not None and _is_current(index, shards):
        for shard in index.shards:
            _warn_of_damage(folder, shard)
        return index
    return build_index(folder, sample_filter)


def build_index(
    folder: Path,
    sample_filter: SampleFilter | None = None,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Index:
    """Make the index of a folder, or bring it up to date: shards that are as they were are not read.

    Args:
        processes: that scan shards at the same time.
        progress: called with (shards done, shards in total).

    Raises:
        UserError: the folder is missing or has no shards, or one cannot be read.
    """
    shards, old = list_shards(folder), _read_if_there(folder, sample_filter)
    path = _writable(index_paths(folder, sample_filter))
    if path is None:
        logger.warning("The index of %s cannot be written; every start scans the shards.", folder)
        return index_shards(folder, shards, sample_filter)
    with durable.writing(path) as unfinished, unfinished.open("wb") as file:
        writer = IndexWriter(file, sample_filter)
        for done, _ in enumerate(_scanned(shards, old, processes, writer)):
            _warn_of_damage(folder, writer.shards[-1])
            if progress is not None:
                progress(done + 1, len(shards))
        writer.finish()
    return read_index(path, folder, sample_filter)


def _scanned(shards: list[Path], old: Index | None, processes: int, writer: "IndexWriter") -> Iterator[None]:
    """Add the shards to ``writer``, one a step: those that are as in ``old`` from there."""
    known = {} if old is None else _known(old)
    stamps = {shard: _stamp(shard) for shard in shards}
    is_known = {shard: known.get(shard.name, (None,))[0] == stamps[shard] for shard in shards}
    with _mapping(processes) as each:
        scan_one = partial(_scan, sample_filter=writer.filter)
        scanned = each(scan_one, [shard for shard in shards if not is_known[shard]])
        for shard in shards:
            if old is not None and is_known[shard]:
                _, first, entry = known[shard.name]
                kinds = [tuple(kind.members) for kind in old.kinds]
                writer.add(entry, old.records[first : first + entry.samples].copy(), kinds)
            else:
                writer.add(*next(scanned))
            yield


class IndexWriter:
    """Writes the file of an index, shard by shard.

    Args:
        file: what it is written to, from its start.
    """

    def __init__(self, file: BinaryIO, sample_filter: SampleFilter | None = None) -> None:
        self.file, self.filter = file, sample_filter
        self.shards: list[IndexedShard] = []
        self.kinds: dict[tuple[str, ...], int] = {}
        self.samples = np.zeros(MAX_KINDS, dtype=np.int64)
        self.block_counts: list[np.ndarray] = []
        self._block = np.empty(0, np.uint16)  # kinds of the records of the last block, which is not full
        file.write(_MAGIC)

    def add(self, shard: IndexedShard, records: np.ndarray, kinds: list[tuple[str, ...]]) -> None:
        """Add a shard whose records number the kinds of ``kinds``.

        Raises:
            UserError: there are too many kinds.
        """
        numbers = np.zeros(max(len(kinds), 1), dtype=np.uint16)
        for number in np.unique(records["kind"]).tolist():
            numbers[number] = self.kinds.setdefault(kinds[number], len(self.kinds))
        if len(self.kinds) > MAX_KINDS:
            raise UserError(
                f"The shards have samples with more than {MAX_KINDS} different sets of members (in {shard.name} for instance "
                f"{', '.join(kinds[-1])}); use shards whose samples are alike."
            )
        records["shard"] = len(self.shards)
        records["kind"] = numbers[records["kind"]]
        self.shards.append(shard)
        self.samples += np.bincount(records["kind"], minlength=MAX_KINDS)
        self.file.write(records.astype(RECORD, copy=False).data)
        self._block = np.concatenate([self._block, records["kind"]])
        while len(self._block) >= BLOCK:
            self._count(self._block[:BLOCK])
            self._block = self._block[BLOCK:]

    def _count(self, block: np.ndarray) -> None:
        self.block_counts.append(np.bincount(block, minlength=len(self.kinds)).astype("<u2"))

    def finish(self) -> None:
        """Write what follows the records."""
        if len(self._block):
            self._count(self._block)
        for counts in self.block_counts:
            self.file.write(np.pad(counts, (0, len(self.kinds) - len(counts))).data)
        counted = zip(self.kinds, self.samples.tolist(), strict=False)
        kinds = [Kind(list(members), samples) for members, samples in counted]
        description = json.dumps(asdict(_Description(1, self.shards, kinds, _text(self.filter)))).encode()
        self.file.write(description + len(description).to_bytes(8, "little"))
        self.file.flush()


def _text(sample_filter: SampleFilter | None) -> str:
    return "" if sample_filter is None else sample_filter.text


def _scan(
    shard: Path, sample_filter: SampleFilter | None
) -> tuple[IndexedShard, np.ndarray, list[tuple[str, ...]]]:
    """Return a shard's entry, its records, and the kinds that they number."""
    samples, damage = scan(shard)
    size, modified = _stamp(shard)
    kinds: dict[tuple[str, ...], int] = {}
    rows = []
    with shard.open("rb", buffering=0) as file:
        for sample in samples:
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
    if samples and not rows:
        damage = "; ".join(filter(None, [damage, "it holds no samples"]))
    return (
        IndexedShard(shard.name, size, modified, len(rows), damage),
        np.array(rows, dtype=RECORD),
        list(kinds),
    )


def _image_size(file: BinaryIO, sample: ArchiveSample) -> tuple[int, int]:
    """Return width and height of a sample's latents or image as its header says, (0, 0) if it cannot be read."""
    name = next((name for name in (LATENTS, *IMAGES) if name in sample.members), None)
    if name is None:
        return 0, 0
    offset, size = sample.members[name]
    try:
        content = io.BufferedReader(_Window(file.fileno(), offset, size), 1 << 13)
        if name == LATENTS:
            if np.lib.format.read_magic(content) != (1, 0):
                return 0, 0
            height, width = np.lib.format.read_array_header_1_0(content)[0][-2:]
        else:
            with Image.open(content, formats=("PNG", "JPEG", "WEBP")) as image:
                width, height = image.size
        return (width, height) if min(width, height) >= 0 and max(width, height) < 1 << 32 else (0, 0)
    except (
        Exception
    ):  # on damaged content the libraries raise nearly anything; reading the sample will say it
        return 0, 0


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
        described = json.loads(os.pread(file.fileno(), size, offset))
    except (ValueError, RecursionError):  # reading the sample will say it, if it is taken
        return sizes
    return described | sizes if isinstance(described, dict) else sizes


class _Window(io.RawIOBase):
    """A part of a file, read as if it were a file of its own."""

    def __init__(self, descriptor: int, offset: int, size: int) -> None:
        self.descriptor, self.offset, self.size, self.position = descriptor, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = max(base + offset, 0)
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(min(len(buffer), self.size - self.position), 0)
        content = os.pread(self.descriptor, count, self.offset + self.position)
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)


def _stamp(shard: Path) -> tuple[int, int]:
    """Return what tells that a shard has changed: bytes, and nanoseconds since 1970."""
    try:
        found = shard.stat()
    except OSError as error:
        raise UserError(
            f"The shard {shard} cannot be read ({error.strerror}); remove or replace it."
        ) from error
    return found.st_size, found.st_mtime_ns


def _is_current(index: Index, shards: list[Path]) -> bool:
    entries = [(shard.name, (shard.size, shard.modified)) for shard in index.shards]
    return entries == [(shard.name, _stamp(shard)) for shard in shards]


def _known(index: Index) -> dict[str, tuple[tuple[int, int], int, IndexedShard]]:
    """Return for every shard its stamp, its first record and its entry."""
    firsts = np.cumsum([0, *(shard.samples for shard in index.shards)]).tolist()
    return {
        shard.name: ((shard.size, shard.modified), first, shard)
        for shard, first in zip(index.shards, firsts, strict=False)
    }


def _warn_of_damage(folder: Path, shard: IndexedShard) -> None:
    if shard.damage:
        logger.warning(
            "Shard %s is damaged (%s); the %d samples found are used.",
            folder / shard.name,
            shard.damage,
            shard.samples,
        )


class _mapping:  # noqa: N801  # a context
    """Maps a function over shards, in order: in this process or in several."""

    def __init__(self, processes: int) -> None:
        self.pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn")) if processes > 1 else None

    def __enter__(self) -> Callable[..., Iterator[tuple[IndexedShard, np.ndarray, list[tuple[str, ...]]]]]:
        return map if self.pool is None else self.pool.map

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


def index_paths(folder: Path, sample_filter: SampleFilter | None = None) -> list[Path]:
    """Return where the index of a folder may lie: with the shards, or in the user's cache."""
    text = _text(sample_filter)
    suffix = f"-{hashlib.sha256(text.encode()).hexdigest()[:16]}" if text else ""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    return [folder / f"{INDEX}{suffix}", cache / "rmoe_megatron" / "index" / f"{name}{suffix}"]


def _writable(paths: list[Path]) -> Path | None:
    """Return the first of some paths where a file can be written."""
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with durable.writing(path.with_name(f"{path.name}.try")) as tried:
                tried.touch()
        except OSError:
            continue
        path.with_name(f"{path.name}.try").unlink(missing_ok=True)
        return path
    return None


def _read_if_there(folder: Path, sample_filter: SampleFilter | None) -> Index | None:
    """Map the index of a folder; None if there is none, or one that is not what it says, which is told."""
    for path in index_paths(folder, sample_filter):
        if path.is_file():
            try:
                return read_index(path, folder, sample_filter)
            except (OSError, ValueError) as error:
                logger.warning("The index %s cannot be used (%s); it is made anew.", path, error)
    return None


def read_index(path: Path, folder: Path, sample_filter: SampleFilter | None = None) -> Index:
    """Map the file of an index into memory.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no index.
    """
    if path.stat().st_size == 0:
        raise ValueError("it is empty")
    return _parse(np.memmap(path, np.uint8, "r"), folder, sample_filter)


def _parse(content: np.ndarray, folder: Path, sample_filter: SampleFilter | None = None) -> Index:
    length = int.from_bytes(content[-8:].tobytes(), "little")
    end = len(content) - 8 - length
    if content[: len(_MAGIC)].tobytes() != _MAGIC or end < len(_MAGIC):
        raise ValueError("it is no index of this version")
    try:
        description = _DESCRIPTION.validate_json(content[end:-8].tobytes(), strict=True)
    except ValidationError as error:
        raise ValueError("its description is damaged") from error
    if description.filter != _text(sample_filter):
        raise ValueError("it is of another filter")
    samples = sum(shard.samples for shard in description.shards)
    kinds, blocks = description.kinds, -(-samples // BLOCK)
    counts = len(_MAGIC) + samples * RECORD.itemsize
    if samples != sum(kind.samples for kind in kinds) or end != counts + 2 * blocks * len(kinds):
        raise ValueError("its length is not that of its samples")
    records = content[len(_MAGIC) : counts].view(RECORD)
    block_counts = content[counts:end].view("<u2").reshape(blocks, len(kinds))
    return Index(folder, description.shards, kinds, records, block_counts)
