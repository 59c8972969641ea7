"""One file per data set that says where every sample lies; mapped into memory, so that a start costs the same for any size.

The file ``.rmoe_index`` lies in the folder of the shards, or in the user's cache where that cannot be written. It is made when
it is missing; when shards have come, gone or changed, only those are scanned again. One record of 32 bytes a sample is followed
by the numbers of samples of each kind in every block of records (so the n-th sample of some kinds is found without a list of
them), by the places of the samples whose members do not lie side by side, by a description in JSON (the shards, the kinds of
samples, both with their counts) and by the length of that.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Annotated, BinaryIO, Literal, Self

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from rmoe_megatron.config.sample_filter import SampleFilter
from rmoe_megatron.errors import UserError

INDEX = ".rmoe_index"
# By the last part of an extension; others are passed over.
MEMBERS = ("png", "jpg", "jpeg", "webp", "avif", "txt", "caption", "json", "cls", "npy")  # fmt: skip
IMAGES = ("png", "jpg", "jpeg", "webp", "avif")
# Pictures under names that training does not take; the index has them so that what lacks a picture can be explained.
OTHER_IMAGES = ("tif", "tiff", "gif", "bmp", "heic", "heif", "jxl", "jp2", "jfif", "jpe", "svg", "psd", "exr")  # fmt: skip
NO_SAMPLES = "it holds no samples"  # the damage of a shard that is sound and of no use
LATENTS = "latents.npy"
LOG_VARIANCE = "latents_log_variance.npy"  # beside latents that are the mean of a distribution
SHARED = "shared.json"  # where in the same shard the other sample is whose text this one has, too
TEXT_HIDDEN_STATES, TEXT_POOLED = "text_hidden_states.npy", "text_pooled.npy"
LEFT_OUT = "left out by the filter"  # stands among the members of such samples
BLOCK = 4096  # records
MAX_KINDS = 256
MAX_REMEMBERED = 1 << 21  # samples whose places a selection remembers, at 2 bytes: eight windows of the order
RECORD = np.dtype(
    [
        ("offset", "<u8"),  # of the sample's first header, in its shard; or the number of its first piece
        ("size", "<u4"),  # bytes from there to the end of its last member; 0 if there are pieces
        ("shard", "<u4"),
        ("width", "<u4"),  # of the image or the latents; 0 if it cannot be told
        ("height", "<u4"),
        ("caption", "<u4"),  # bytes of the .txt member
        ("kind", "<u2"),
        ("pieces", "<u2"),  # in how many pieces its members lie; 0 if they lie side by side
    ]
)
assert RECORD.itemsize == 32
PIECE = np.dtype([("offset", "<u8"), ("size", "<u4"), ("reserved", "<u4")])  # as of a record, in its shard
NO_PIECES = np.empty(0, PIECE)
MAX_PIECES = (1 << 16) - 1  # of a sample
_MAX_IN_MEMORY = 1 << 26  # bytes of pieces while an index is made
_MAGIC = b"rmoe_megatron index 4\n".ljust(RECORD.itemsize)


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
    version: Literal[4]
    shards: list[IndexedShard]
    kinds: Annotated[list[Kind], Field(max_length=MAX_KINDS)]
    pieces: Count
    filter: str  # empty if there is none


_DESCRIPTION = TypeAdapter(_Description)


@dataclass(frozen=True)
class Index:
    """The samples of a folder's shards, in the order of the shards' names and of the samples in them.

    Attributes:
        folder: where the shards lie, as users name it.
        records: one of ``RECORD`` a sample, [samples].
        block_counts: samples of each kind in each block of ``BLOCK`` records, uint16 [blocks, kinds].
        pieces: one of ``PIECE`` for every piece of the samples whose members do not lie side by side, [pieces].
    """

    folder: str
    shards: list[IndexedShard]
    kinds: list[Kind]
    records: np.ndarray
    block_counts: np.ndarray
    pieces: np.ndarray

    def __len__(self) -> int:
        return len(self.records)

    def describe(self) -> str:
        """Return what the folder holds, in words, with a fingerprint of the names and sizes of its shards and of their numbers of samples."""
        digest = hashlib.sha256()  # not of the records, which may be larger than the memory
        for shard in self.shards:
            digest.update(f"{shard.name} {shard.size} {shard.samples}\n".encode())
        size = sum(shard.size for shard in self.shards)
        return f"{self.folder}: {len(self.shards)} shards, {len(self)} samples, {size} bytes, fingerprint {digest.hexdigest()[:16]}"

    def is_sound(self, record: np.void) -> bool:
        """Whether a record names a shard, a kind and pieces that there are; the file may be damaged."""
        last_piece = int(record["offset"]) + int(record["pieces"]) if record["pieces"] else 0
        return bool(
            record["shard"] < len(self.shards)
            and record["kind"] < len(self.kinds)
            and last_piece <= len(self.pieces)
        )

    def extents(self, record: np.void) -> list[tuple[int, int]]:
        """Return the offset and the size of every piece of a sample in its shard."""
        first, count = int(record["offset"]), int(record["pieces"])
        if not count:
            return [(first, int(record["size"]))]
        return [(int(piece["offset"]), int(piece["size"])) for piece in self.pieces[first : first + count]]

    def shard_part(self, first: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
        """Return copies of a shard's records, and of its pieces, which these number from 0.

        Args:
            first: place of its first record.
        """
        records = self.records[first : first + samples].copy()
        scattered = records[records["pieces"] > 0]
        if not len(scattered):
            return records, NO_PIECES
        start = int(scattered["offset"].min())
        end = int((scattered["offset"] + scattered["pieces"]).max())
        records["offset"][records["pieces"] > 0] -= np.uint64(start)
        return records, self.pieces[start:end].copy()


def provided(members: set[str]) -> set[str]:
    """Return a sample's members with those that it shares with another one."""
    return members | {TEXT_HIDDEN_STATES, TEXT_POOLED} if SHARED in members else members


class Selection:
    """Some samples of an index, by their number; holds 8 bytes for ``BLOCK`` of them.

    Args:
        counts: how many every block has, integers [blocks].
        matches: takes records and returns which of them are meant, bool [records].
    """

    def __init__(self, index: Index, counts: np.ndarray, matches: Callable[[np.ndarray], np.ndarray]) -> None:
        self.index, self.matches = index, matches
        self._places: dict[int, np.ndarray] = {}  # of the samples in the blocks that were asked for last
        self._remembered = 0
        self._ends = np.cumsum(counts, dtype=np.int64)

    @classmethod
    def of_kinds(cls, index: Index, is_wanted: Callable[[set[str]], bool]) -> Self:
        """Return the samples whose members ``is_wanted`` takes by their extensions."""
        kinds = wanted_kinds(index, is_wanted)
        return cls(index, index.block_counts[:, kinds].sum(axis=1), lambda records: kinds[records["kind"]])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, number: int) -> int:
        """Return the place of the ``number``-th wanted sample in the index."""
        if len(self) == len(self.index):
            return number
        # The records are a file's, which may be damaged; looking at all of them would take as long as there are samples.
        block = int(np.searchsorted(self._ends, number, side="right"))
        before = int(self._ends[block - 1]) if block else 0
        try:
            return block * BLOCK + int(self._places_in(block)[number - before])
        except IndexError as error:
            raise UserError(
                f"The index of {self.index.folder} is damaged in block {block}; remove its {INDEX} and start again."
            ) from error

    def _places_in(self, block: int) -> np.ndarray:
        """Return the places of the samples in a block, uint16; draws near in time ask for few blocks."""
        if block not in self._places:
            while self._remembered > MAX_REMEMBERED:
                self._remembered -= len(self._places.pop(next(iter(self._places))))
            records = self.index.records[block * BLOCK : (block + 1) * BLOCK]
            self._places[block] = np.flatnonzero(self.matches(records)).astype(np.uint16)
            self._remembered += len(self._places[block])
        return self._places[block]


def wanted_kinds(index: Index, is_wanted: Callable[[set[str]], bool]) -> np.ndarray:
    """Return of which kinds the members are wanted, bool [kinds]."""
    return np.array([is_wanted(set(kind.members)) for kind in index.kinds], dtype=bool)


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
        self._pieces = SpooledTemporaryFile(_MAX_IN_MEMORY)  # noqa: SIM115
        file.write(_MAGIC)

    def add(
        self,
        shard: IndexedShard,
        records: np.ndarray,
        kinds: list[tuple[str, ...]],
        pieces: np.ndarray = NO_PIECES,
    ) -> None:
        """Add a shard whose records number the kinds of ``kinds`` and the pieces of ``pieces``.

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
        records["offset"][records["pieces"] > 0] += np.uint64(self._pieces.tell() // PIECE.itemsize)
        self._pieces.write(pieces.astype(PIECE, copy=False).tobytes())
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
        pieces = self._pieces.tell() // PIECE.itemsize
        self._pieces.seek(0)
        shutil.copyfileobj(self._pieces, self.file)
        self._pieces.close()
        counted = zip(self.kinds, self.samples.tolist(), strict=False)
        kinds = [Kind(list(members), samples) for members, samples in counted]
        description = json.dumps(
            asdict(_Description(4, self.shards, kinds, pieces, filter_text(self.filter)))
        ).encode()
        self.file.write(description + len(description).to_bytes(8, "little"))
        self.file.flush()


def filter_text(sample_filter: SampleFilter | None) -> str:
    """Return what an index says of the filter that it was made with."""
    return "" if sample_filter is None else sample_filter.text


def read_index(path: Path, folder: str, sample_filter: SampleFilter | None = None) -> Index:
    """Map the file of an index into memory.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no index.
    """
    if path.stat().st_size == 0:
        raise ValueError("it is empty")
    return parse_index(np.memmap(path, np.uint8, "r"), folder, sample_filter)


def parse_index(content: np.ndarray, folder: str, sample_filter: SampleFilter | None = None) -> Index:
    """Return the index whose file has this content, uint8 [bytes]; it shares the memory.

    Raises:
        ValueError: it is no index, or one with another filter.
    """
    length = int.from_bytes(content[-8:].tobytes(), "little")
    end = len(content) - 8 - length
    if content[: len(_MAGIC)].tobytes() != _MAGIC or end < len(_MAGIC):
        raise ValueError("it is no index of this version")
    try:
        description = _DESCRIPTION.validate_json(content[end:-8].tobytes(), strict=True)
    except ValidationError as error:
        raise ValueError("its description is damaged") from error
    if description.filter != filter_text(sample_filter):
        raise ValueError("it is of another filter")
    samples = sum(shard.samples for shard in description.shards)
    kinds, blocks = description.kinds, -(-samples // BLOCK)
    counts = len(_MAGIC) + samples * RECORD.itemsize
    pieces = counts + 2 * blocks * len(kinds)
    if samples != sum(kind.samples for kind in kinds) or end != pieces + description.pieces * PIECE.itemsize:
        raise ValueError("its length is not that of its samples")
    return Index(
        folder,
        description.shards,
        kinds,
        records=content[len(_MAGIC) : counts].view(RECORD),
        block_counts=content[counts:pieces].view("<u2").reshape(blocks, len(kinds)),
        pieces=content[pieces:end].view(PIECE),
    )
