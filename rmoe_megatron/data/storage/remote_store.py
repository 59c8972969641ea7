"""Shards behind fsspec: an object store or a web server, read by ranges that are tried again."""

import hashlib
import io
import logging
import os
import random
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from rmoe_megatron.data.storage.block_cache import BlockCache
from rmoe_megatron.data.storage.range_file import RangeFile
from rmoe_megatron.data.storage.store import LocalStore, ShardStore, StoredShard, cache_path
from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic

logger = logging.getLogger(__name__)

ATTEMPTS = 6
FIRST_PAUSE = 0.5  # seconds before the second attempt; doubled before each further one
READERS = 16  # ranges of a remote store that a process reads at the same time
# What stores tell of a file that is another one when its content is.
MARKS = (
    "ETag",
    "etag",
    "md5Hash",
    "Content-MD5",
    "LastModified",
    "Last-Modified",
    "last_modified",
    "mtime",
    "updated",
)
READ_BLOCK = 1 << 22  # bytes that a scan of a remote shard reads at once
_REMOTE = re.compile(r"[a-z][a-z0-9+.-]+://.+")
_CREDENTIALS = re.compile(r"[^/]*//[^/]*@|.*\?")


class RemoteStore(ShardStore):
    """Shards of an object store or a web server, through fsspec; credentials come from the environment.

    Args:
        location: URL of a folder, ``s3://bucket/folder`` for instance.
        cache: keeps what was read; None reads every range anew.
    """

    def __init__(self, location: str, cache: BlockCache | None = None) -> None:
        self.location, self.cache = location.rstrip("/"), cache
        self.sizes: dict[str, StoredShard] = {}
        self._process: int | None = None
        self._connect()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin without connections."""
        self.__dict__.update(state)
        self._process = None

    def _connect(self) -> Any:
        """Return this process's own file system: fsspec's threads do not survive a fork."""
        if self._process != os.getpid():
            import fsspec

            protocol = self.location.partition("://")[0]
            try:
                self._files: Any = fsspec.filesystem(protocol, skip_instance_cache=True)
            except (ImportError, ValueError) as error:
                raise UserError(
                    f"{self.location} cannot be read: {str(error).splitlines()[0]} (the extras s3, gs and http of "
                    "rmoe-megatron bring what these stores need)."
                ) from error
            self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="shards")
            self._process = os.getpid()
        return self._files

    def shards(self) -> list[StoredShard]:
        """Return the shards by name."""

        def fresh(files: Any) -> list[dict[str, Any]]:
            files.invalidate_cache()
            return list(files.ls(self.location, detail=True))

        listed = self._persist(fresh, f"The folder {self.location}")
        found = [
            _described(entry)
            for entry in listed
            if entry["name"].endswith(".tar") and entry["type"] == "file"
        ]
        if any(shard.size < 0 for shard in found):  # a web server's page of links has no sizes
            found = [self._asked(shard.name) for shard in found]
        if not found:
            raise UserError(f"The folder {self.location} has no .tar shards; build or upload the data first.")
        self.sizes = {shard.name: shard for shard in found}
        return sorted(found)

    def _size(self, name: str) -> StoredShard:
        if name not in self.sizes:
            self.sizes[name] = self._asked(name)
        return self.sizes[name]

    def _asked(self, name: str) -> StoredShard:
        return _described(
            self._persist(lambda files: files.info(self.path(name)), f"The shard {self.path(name)}")
        )

    def open(self, name: str) -> BinaryIO:
        """Open a shard to read it from its start."""
        raw = RangeFile(partial(self._fetched, name), self._size(name).size)
        return io.BufferedReader(raw, READ_BLOCK)  # reads ahead, and goes back within what it has

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Return bytes of a shard, fewer at its end."""
        shard = self._size(name)
        size = max(min(size, shard.size - offset), 0)
        if self.cache is None:
            return self._fetched(name, offset, size)
        identity = f"{self.path(name)} {shard.size} {shard.modified}"
        return self.cache.read(identity, shard.size, offset, size, lambda *place: self._fetched(name, *place))

    def read_later(self, name: str, offset: int, size: int) -> Future[bytes]:
        """Begin to read, in the background."""
        self._connect()
        return self._readers.submit(self.read, name, offset, size)

    def _fetched(self, name: str, offset: int, size: int) -> bytes:
        def ranged(files: Any) -> bytes:
            content = files.cat_file(self.path(name), start=offset, end=offset + size) if size else b""
            if len(content) != size:
                raise OSError(
                    f"{len(content)} bytes came instead of {size}; does the server answer range requests?"
                )
            return bytes(content)

        return cast(bytes, self._persist(ranged, f"The shard {self.path(name)}"))

    def index_paths(self, name: str) -> list[Path]:
        """Return a file in the user's cache."""
        return [cache_path(self.location, name)]

    def fetch(self, name: str, path: Path) -> bool:
        """Copy a file beside the shards to a local path; whether it is there."""
        url = self.path(name)
        if not self._persist(lambda files: files.exists(url), url):
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.writing(path) as unfinished:
            self._persist(lambda files: files.get_file(url, str(unfinished)), url)
        return True

    def sibling(self, name: str) -> Path | None:
        """Return a local copy of a file beside the folder."""
        beside = RemoteStore(self.location.rsplit("/", 1)[0])
        path = cache_path(beside.location, f"-{name}")
        return path if beside.fetch(name, path) else None

    def publish(self, path: Path, name: str) -> None:
        """Copy a local file beside the shards, for other machines; what cannot be written is told."""
        try:
            self._connect().put_file(str(path), self.path(name))
        except Exception as error:  # every store raises its own
            logger.warning(
                "%s cannot be written (%s); every machine makes its own.", self.path(name), _reason(error)
            )

    def _persist(self, action: Callable[[Any], Any], what: str) -> Any:
        """Return what ``action`` does with the file system, after several attempts if need be.

        Raises:
            UserError: it is not there or not ours to read, or no attempt succeeded.
        """
        for attempt in range(ATTEMPTS):
            try:
                return action(self._connect())
            except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
                raise UserError(
                    f"{what} cannot be read ({_reason(error)}); check its name and your credentials."
                ) from error
            except UserError:
                raise
            except Exception as error:  # every store raises its own
                if attempt == ATTEMPTS - 1:
                    raise UserError(
                        f"{what} cannot be read: {ATTEMPTS} attempts failed, the last with {_reason(error)}; check the network "
                        "and the store, then resume."
                    ) from error
                pause = FIRST_PAUSE * 2**attempt * random.uniform(0.5, 1.5)
                logger.warning(
                    "%s could not be read (%s); attempt %d of %d follows in %.1f s.",
                    what, _reason(error), attempt + 2, ATTEMPTS, pause,
                )  # fmt: skip
                time.sleep(pause)
        raise AssertionError("unreachable")


def shard_store(location: str, cache: BlockCache | None = None) -> ShardStore:
    """Return the store of a folder or URL.

    Raises:
        UserError: the URL has credentials in it, which would end in logs and configurations.
    """
    if _REMOTE.fullmatch(location) and _CREDENTIALS.match(location):
        host = location.partition("://")[2].partition("/")[0].rpartition("@")[2]
        raise UserError(
            f"The URL of shards at {host} has a user or a query in it; leave them out: credentials come from the environment."
        )
    return RemoteStore(location, cache) if _REMOTE.fullmatch(location) else LocalStore(Path(location))


def _described(entry: dict[str, Any]) -> StoredShard:
    """Return a shard from what fsspec says of it."""
    marks = [entry.get(key) for key in MARKS]
    digest = hashlib.sha256(repr([str(mark) for mark in marks]).encode()).digest()
    size = entry.get("size")
    return StoredShard(
        entry["name"].rsplit("/", 1)[-1], -1 if size is None else int(size), int.from_bytes(digest[:7])
    )


def _reason(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__} {text}".rstrip()
