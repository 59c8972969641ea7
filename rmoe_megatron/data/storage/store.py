"""Where shards lie, read by ranges: what a store is, and a folder of this machine or of a network disk."""

import hashlib
import os
import stat
from abc import ABC, abstractmethod
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from rmoe_megatron.errors import UserError

MAX_OPEN_SHARDS = 256


class StoredShard(NamedTuple):
    """A shard as a store lists it.

    Attributes:
        size: in bytes.
        modified: nanoseconds since 1970, or another number that changes with the content.
    """

    name: str
    size: int
    modified: int


class ShardStore(ABC):
    """A folder of .tar shards.

    Attributes:
        location: as users name it.
    """

    location: str

    def __str__(self) -> str:
        return self.location

    @abstractmethod
    def shards(self) -> list[StoredShard]:
        """Return the shards by name.

        Raises:
            UserError: the folder is missing or has no shards.
        """

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """Open a shard to read it from its start.

        Raises:
            UserError: it cannot be read.
        """

    @abstractmethod
    def read(self, name: str, offset: int, size: int) -> bytes:
        """Return bytes of a shard, fewer at its end.

        Raises:
            OSError: a local shard cannot be read.
            UserError: a remote one cannot, after several attempts.
        """

    @abstractmethod
    def index_paths(self, name: str) -> list[Path]:
        """Return the local files that may hold the index of this name, or what belongs to it."""

    @abstractmethod
    def sibling(self, name: str) -> Path | None:
        """Return a local copy of a file beside the folder, None if there is none."""

    def read_later(self, name: str, offset: int, size: int) -> Future[bytes] | None:
        """Begin to read, in the background; None where that gains nothing."""
        return None

    def fetch(self, name: str, path: Path) -> bool:
        """Copy a file beside the shards to a local path; whether it is there."""
        return False

    def publish(self, path: Path, name: str) -> None:
        """Copy a local file beside the shards, for other machines; what cannot be written is told."""
        return

    def path(self, name: str) -> str:
        """Return where a shard is, in words."""
        return f"{self.location.rstrip('/')}/{name}"

    def __getstate__(self) -> dict[str, Any]:
        """Open files, connections and threads are a process's own."""
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_")}


COMPRESSED_SHARDS = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2", ".zip")
TABLES = (".parquet", ".arrow", ".csv", ".tsv", ".jsonl")


class LocalStore(ShardStore):
    """Shards of a folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.location = folder, str(folder)
        self._descriptors: dict[str, int] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin without open shards."""
        self.__init__(state["folder"])  # type: ignore[misc]

    def shards(self) -> list[StoredShard]:
        """Return the shards by name."""
        if not self.folder.is_dir():
            raise UserError(
                f"There is no shard folder {self.folder}; point the data setting at a folder of .tar shards."
            )
        found = sorted(self.folder.glob("*.tar"))
        if not found:
            raise UserError(f"The folder {self.folder} has no .tar shards; {_what_to_do(self.folder)}.")
        return [self._described(shard) for shard in found]

    def _described(self, shard: Path) -> StoredShard:
        try:
            found = shard.stat()
        except OSError as error:
            raise _unreadable(shard, error) from error
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for its writer
            raise _unreadable(shard, OSError(0, "it is no regular file"))
        return StoredShard(shard.name, found.st_size, found.st_mtime_ns)

    def open(self, name: str) -> BinaryIO:
        """Open a shard to read it from its start."""
        shard = self.folder / name
        try:
            if not stat.S_ISREG(shard.stat().st_mode):  # opening a pipe would wait for its writer
                raise OSError(0, "it is no regular file")
            return shard.open("rb")
        except OSError as error:
            raise _unreadable(shard, error) from error

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Return bytes of a shard, fewer at its end."""
        # pread has no file position, which forked workers would share.
        return os.pread(self._descriptor(name), size, offset)

    def _descriptor(self, name: str) -> int:
        """Return an open shard's descriptor; the shards that were opened longest ago are closed."""
        if name not in self._descriptors:
            if len(self._descriptors) == MAX_OPEN_SHARDS:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[name] = os.open(self.folder / name, os.O_RDONLY)
        return self._descriptors[name]

    def index_paths(self, name: str) -> list[Path]:
        """Return a file beside the shards, and one in the user's cache for where that cannot be written."""
        return [self.folder / name, cache_path(str(self.folder.resolve()), name)]

    def sibling(self, name: str) -> Path | None:
        """Return a local copy of a file beside the folder."""
        path = self.folder.parent / name
        return path if path.is_file() else None


def cache_path(place: str, name: str) -> Path:
    """Return a file of the user's cache for what belongs to a place."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    digest = hashlib.sha256(place.encode()).hexdigest()[:32]
    return cache / "rmoe_megatron" / "index" / f"{digest}{name}"


def _unreadable(shard: Path, error: OSError) -> UserError:
    return UserError(f"The shard {shard} cannot be read ({error.strerror}); remove or replace it.")


def _what_to_do(folder: Path) -> str:
    """Return what a folder without shards holds instead, and what to do about it."""
    names = sorted(path.name for path in folder.iterdir())
    below = next((path.parent for path in sorted(folder.glob("*/*.tar"))), None)
    if below is not None:
        return f"there are some in {below}: name that folder, or several with data.mixture"
    compressed = next((name for name in names if name.lower().endswith(COMPRESSED_SHARDS)), None)
    if compressed is not None:
        return f"{compressed} is compressed, and shards are read at any place: unpack it (`gunzip` of .tar.gz leaves .tar)"
    capitals = next((name for name in names if name.lower().endswith(".tar")), None)
    if capitals is not None:
        return f"{capitals} is not called .tar: rename it"
    table = next((name for name in names if name.lower().endswith(TABLES)), None)
    if table is not None:
        return f"{table} is a table: make shards of it with `rmoe data pack`"
    return "build or download the data first"
