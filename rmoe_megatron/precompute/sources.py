"""What each shard of a precomputed set was made of: the source's shard as it was then.

While a set is made, every shard has a record of its own, written after the shard itself; the finished set has all of them in one
file. A shard without a record, or whose source is not what the record says, is encoded anew.
"""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

from pydantic import TypeAdapter, with_config

from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic
from rmoe_megatron.files.untrusted import CLOSED, lines_of, parse_json, read_json, read_text

logger = logging.getLogger(__name__)

SOURCES = "sources.jsonl"  # of a finished set, one line a shard
_RECORDS = ".sources"  # folder of an unfinished set, one file a shard
_MAX_BYTES = 1 << 30  # of the file of a finished set


@dataclass(frozen=True)
class ShardSource:
    """A shard of the source as it was when it was encoded.

    Attributes:
        shard: its path below the source, which is also that of what was made of it.
        size: in bytes.
        modified: nanoseconds since 1970; of the content.
        changed: likewise; of the content, the times or the permissions. No program can set it to an earlier time.
        sha256: the content's hash.
    """

    shard: str
    size: int
    modified: int
    changed: int
    sha256: str

    def is_untouched(self, path: Path) -> bool:
        """Whether nobody has written to the shard since, as its times say; nothing is read."""
        found = path.stat()
        return (found.st_size, found.st_mtime_ns, found.st_ctime_ns) == (
            self.size,
            self.modified,
            self.changed,
        )


@with_config(CLOSED)
class _Described(TypedDict):
    """A line of the file of a finished set."""

    shard: str
    size: int
    modified: int
    changed: int
    sha256: str


_DESCRIBED = TypeAdapter(_Described)


def describe(source: Path, shard: str) -> ShardSource:
    """Describe a shard as it is now; all of it is read.

    Args:
        source: the folder that ``shard`` is a path below.

    Raises:
        UserError: it cannot be read, or is written to meanwhile.
    """
    path = source / shard
    try:
        before = path.stat()
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        described = ShardSource(shard, before.st_size, before.st_mtime_ns, before.st_ctime_ns, digest)
        if described.is_untouched(path):
            return described
    except OSError as error:
        raise UserError(f"The shard {path} cannot be read ({error.strerror}).") from error
    raise UserError(f"The shard {path} is being written to; precompute it when it is complete.")


class Records:
    """The records of an unfinished set, which the processes that make it share.

    Args:
        folder: the folder of the unfinished set.
        source: where the raw shards lie.
    """

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder, self.source = folder, source

    def _path(self, shard: str) -> Path:
        return self.folder / _RECORDS / f"{shard}.json"

    def get(self, shard: str) -> ShardSource | None:
        """Return what a shard of the set was made of; None if it is not there."""
        path = self._path(shard)
        if not (self.folder / shard).is_file() or not path.is_file():
            return None
        return ShardSource(**read_json(path, _DESCRIBED))

    def put(self, record: ShardSource) -> None:
        """Say what a shard, which is there, was made of."""
        path = self._path(record.shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.writing(path) as partial:
            partial.write_text(json.dumps(asdict(record)) + "\n")

    def forget(self, shard: str) -> None:
        """Before a shard is written anew, no longer say what the old one was made of."""
        self._path(shard).unlink(missing_ok=True)

    def is_current(self, shard: str) -> bool:
        """Whether the set has a shard that was made of the source's as it is now.

        Where the source was copied or touched since, its content decides.
        """
        record = self.get(shard)
        if record is None:
            return False
        if record.is_untouched(self.source / shard):
            return True
        found = describe(self.source, shard)
        if found.sha256 != record.sha256:
            logger.warning("%s has changed since it was encoded; it is encoded anew.", self.source / shard)
            return False
        self.put(found)
        return True

    def take_over(self, finished: Path, record: ShardSource) -> bool:
        """Take a shard of a finished set if it was made of the source's as it is now."""
        path, target = self.source / record.shard, self.folder / record.shard
        if not (finished / record.shard).is_file():
            return False
        if not record.is_untouched(path):
            found = describe(self.source, record.shard)
            if found.sha256 != record.sha256:
                logger.warning("%s has changed since it was encoded; it is encoded anew.", path)
                return False
            record = found
        target.parent.mkdir(parents=True, exist_ok=True)
        link(finished / record.shard, target)
        self.put(record)
        return True

    def outdated(self, shards: list[str]) -> list[str]:
        """Return the shards of the set whose source has been written to since; one that is missing is none of them."""
        records = [self.get(shard) for shard in shards]
        return [
            record.shard
            for record in records
            if record is not None and not record.is_untouched(self.source / record.shard)
        ]

    def finish(self, shards: list[str]) -> None:
        """Write the file of the finished set."""
        records = [self.get(shard) for shard in shards]
        lines = [json.dumps(asdict(record)) + "\n" for record in records if record is not None]
        with atomic.writing(self.folder / SOURCES) as partial:
            partial.write_text("".join(lines))


def link(path: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no such thing; ``target`` gives way."""
    with atomic.writing(target) as partial:
        try:
            os.link(path, partial)
        except OSError:
            shutil.copy2(path, partial)


def remove_records(finished: Path) -> None:
    """Remove the records of single shards from a finished set, which has them in one file."""
    atomic.remove(finished / _RECORDS)


def read_sources(finished: Path) -> dict[str, ShardSource]:
    """Return what the shards of a finished set were made of, by their paths.

    Raises:
        UserError: the file is damaged.
    """
    path = finished / SOURCES
    records = [
        ShardSource(**parse_json(line, _DESCRIBED, f"Line {number} of {path}"))
        for number, line in enumerate(lines_of(read_text(path, _MAX_BYTES)), start=1)
    ]
    return {record.shard: record for record in records}
