"""What of a packing is done, so that the same command goes on after it was ended: whole shards, and which pictures they are of."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypedDict

from pydantic import TypeAdapter, with_config

from rmoe_megatron.data.packing.rows import Columns, Packed, Picture
from rmoe_megatron.files import atomic, claims
from rmoe_megatron.files.disk_errors import about
from rmoe_megatron.files.untrusted import CLOSED, read_json

FILE = "progress.json"  # in the unfinished folder


@with_config(CLOSED)
class Done(TypedDict):
    """The shards that are whole: how many, with how many samples, of how many pictures, and which pictures were left out.

    ``digest`` is of the pictures, with the sizes and times of their files, and of the settings.
    """

    shards: int
    samples: int
    pictures: int
    left_out: list[list[str]]
    digest: str


_DONE = TypeAdapter(Done)


class PicturesSeen:
    """A digest of the pictures that have been looked at, in their order, and of how they are packed."""

    def __init__(self, columns: Columns, samples_per_shard: int, split: str | None) -> None:
        self.count = 0
        self._digest = hashlib.sha256(
            json.dumps([columns.image, columns.caption, samples_per_shard, split]).encode()
        )

    def add(self, picture: Picture) -> None:
        """Note the next picture."""
        self.count += 1
        self._digest.update(json.dumps([picture.name, [_state_of(path) for path in picture.files]]).encode())

    def digest(self) -> str:
        """Return the digest of those so far."""
        return self._digest.hexdigest()

    def are_those_of(self, done: Done, pictures: Iterator[Picture]) -> bool:
        """Take as many pictures as ``done`` was made of; returns whether they are the same, and unchanged."""
        while self.count < done["pictures"]:
            picture = next(pictures, None)
            if picture is None:
                return False
            self.add(picture)
        return self.digest() == done["digest"]


def _state_of(path: Path) -> list[object]:
    try:
        found = path.stat()
    except (OSError, ValueError):  # no such file, or no name of one
        return [str(path)]
    return [str(path), found.st_size, found.st_mtime_ns]


@contextmanager
def going_on(out: Path) -> Iterator[Path]:
    """Build the folder ``out`` under another name, and keep what was finished of it if the context is left too early.

    Nothing is kept where no shard is whole.

    Yields:
        The folder to build in, in which an earlier command may have left shards.

    Raises:
        UserError: another process is building it, or ``out`` holds something.
    """
    unfinished = out.with_name(f".{out.name}.packing.partial")
    with about(out, unfinished):
        out.parent.mkdir(parents=True, exist_ok=True)
        with claims.only_process(atomic.claim_of(out), f"{out} is being made"):
            atomic.require_empty(out, "The output")
            unfinished.mkdir(exist_ok=True)
            try:
                yield unfinished
                (unfinished / FILE).unlink(missing_ok=True)
                atomic.sync(unfinished)
                atomic.put_in_place(unfinished, out)
            except BaseException:
                with suppress(OSError):
                    _tidy(unfinished)
                raise


def read_done(unfinished: Path) -> Done | None:
    """Return what an earlier command has finished, None if that is nothing."""
    path = unfinished / FILE
    return read_json(path, _DONE) if path.is_file() else None


def write_done(unfinished: Path, packed: Packed, seen: PicturesSeen) -> None:
    """Note that the shards so far are whole."""
    done: Done = {
        "shards": packed.shards,
        "samples": packed.samples,
        "pictures": seen.count,
        "left_out": [list(each) for each in packed.left_out],
        "digest": seen.digest(),
    }
    atomic.write(unfinished / FILE, json.dumps(done))


def begin_anew(unfinished: Path) -> None:
    """Remove all that an earlier command has left in the folder."""
    for path in unfinished.iterdir():
        atomic.remove(path)


def shard_path(folder: Path, number: int) -> Path:
    """Return where a shard is written."""
    return folder / f"{number:06d}.tar"


def _tidy(unfinished: Path) -> None:
    """Leave whole shards alone, or nothing."""
    done = read_done(unfinished)
    if done is None:
        atomic.remove(unfinished)
        return
    whole = {shard_path(unfinished, number) for number in range(done["shards"])}
    for path in unfinished.iterdir():
        if path not in whole and path.name != FILE:
            atomic.remove(path)
