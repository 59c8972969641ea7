"""Where the embeddings of captions lie in the shards of an unfinished set: what one process has encoded no other one encodes again.

Every finished shard has a file of its captions' places, which the processes that make the set read from each other; a restarted one
reads those of before. They are of the same encoders, because the set's ``dataset.json`` says of which it is. A place is believed if
the caption itself stands there.
"""

import hashlib
import io
import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rmoe_megatron.data.shards.archive import parse
from rmoe_megatron.data.shards.decoding import BFLOAT16, DECODERS
from rmoe_megatron.data.shards.index import TEXT_HIDDEN_STATES, TEXT_POOLED
from rmoe_megatron.files import atomic

logger = logging.getLogger(__name__)

_FOLDER = ".captions"  # of an unfinished set, one file a shard
MAX_STORED = 1 << 20  # captions whose places are remembered, at some 200 bytes
_PLACE = np.dtype([("digest", "V16"), ("offset", "<i8"), ("size", "<i8")])


class StoredCaptions:
    """Finds captions in finished shards.

    Args:
        folder: holds the unfinished set.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[bytes, tuple[str, int, int]] = {}  # digest of a caption -> shard, offset, size
        self._read: set[str] = set()
        self._as_of = -1  # when the folder of places was looked at last: its time of modification

    def put(self, shard: str, places: dict[str, dict[str, int]]) -> None:
        """Say where captions lie in a shard that has been written.

        Args:
            shard: its path below the folder.
            places: ``offset`` and ``size`` of the sample with the embedding of each caption.
        """
        rows = [(_digest(caption), each["offset"], each["size"]) for caption, each in places.items()]
        self._remember(shard, rows)
        content, path = io.BytesIO(), self._path(shard)
        np.savez(content, shard=np.array(shard), places=np.array(rows, dtype=_PLACE))
        path.parent.mkdir(exist_ok=True)
        with atomic.writing(path) as partial:
            partial.write_bytes(content.getvalue())
        self._read.add(path.name)

    def look(self) -> None:
        """Read what other processes, and earlier ones, have said since the last look."""
        folder = self.folder / _FOLDER
        try:
            as_of = folder.stat().st_mtime_ns
            if as_of == self._as_of:
                return
            names = sorted(path.name for path in folder.glob("*.npz"))
        except FileNotFoundError:
            return
        self._as_of = as_of
        for name in names:
            if name not in self._read:
                self._read.add(name)
                self._read_file(folder / name)

    def find(self, caption: str) -> tuple[Tensor, Tensor] | None:
        """Return token states [L, D] and pooled embedding [P] of a caption from a finished shard; None if there is none."""
        digest = _digest(caption)
        if (place := self._places.get(digest)) is None:
            return None
        shard, offset, size = place
        try:
            with (self.folder / shard).open("rb") as file:
                file.seek(offset)
                content = memoryview(file.read(size))
            members = {
                name: bytes(content[start - offset :][:length])
                for name, (start, length) in parse(content, offset).members.items()
            }
            if members["txt"].decode() == caption:
                return _tensor(members[TEXT_HIDDEN_STATES]), _tensor(members[TEXT_POOLED])
        except (OSError, ValueError, KeyError) as error:
            logger.warning(
                "The text in %s cannot be read again (%s); it is encoded again.", self.folder / shard, error
            )
        del self._places[digest]  # the shard was made anew
        return None

    def __contains__(self, caption: str) -> bool:
        """Whether a place of a caption is known."""
        return _digest(caption) in self._places

    def _path(self, shard: str) -> Path:
        name = hashlib.blake2b(shard.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
        return self.folder / _FOLDER / f"{name}.npz"

    def _read_file(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as file:
                shard, places = str(file["shard"]), file["places"]
            rows = [(bytes(row["digest"]), int(row["offset"]), int(row["size"])) for row in places]
        except Exception as error:  # on damaged content numpy raises nearly anything
            logger.warning("%s cannot be read (%s); its captions may be encoded again.", path, error)
            return
        self._remember(shard, rows)

    def _remember(self, shard: str, rows: list[tuple[bytes, int, int]]) -> None:
        """Remember places; those that were remembered first are forgotten first."""
        for digest, offset, size in rows:
            self._places[digest] = (shard, offset, size)
        while len(self._places) > MAX_STORED:
            self._places.pop(next(iter(self._places)))


def remove_places(folder: Path) -> None:
    """Remove the places from a set that is about to be finished."""
    atomic.remove(folder / _FOLDER)


def _digest(caption: str) -> bytes:
    return hashlib.blake2b(caption.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _tensor(content: bytes) -> Tensor:
    array: np.ndarray = DECODERS["npy"](content)
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
