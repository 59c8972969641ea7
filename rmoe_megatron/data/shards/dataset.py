"""Random access to the samples of WebDataset tar shards, over the index of their folder."""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from rmoe_megatron.config.sample_filter import SampleFilter
from rmoe_megatron.data.shards.archive import parse
from rmoe_megatron.data.shards.bucketing import BucketCounts, Bucketing
from rmoe_megatron.data.shards.build_index import index_name, index_shards, open_index
from rmoe_megatron.data.shards.decoding import DECODERS, MAX_TEXT, MIDDLE, View, decode_image
from rmoe_megatron.data.shards.index import (
    IMAGES,
    INDEX,
    LATENTS,
    LEFT_OUT,
    LOG_VARIANCE,
    MEMBERS,
    NO_SAMPLES,
    SHARED,
    TEXT_HIDDEN_STATES,
    TEXT_POOLED,
    Selection,
    provided,
)
from rmoe_megatron.data.shards.unusable import apart, what_to_do
from rmoe_megatron.data.storage.store import LocalStore, ShardStore
from rmoe_megatron.errors import UserError

logger = logging.getLogger(__name__)


class NoSamplesError(UserError):
    """Shards have samples, and none that is wanted."""


class ShardDataset(Dataset[Any]):
    """The samples of all shards of a folder, decoded, as dictionaries from extension to value.

    A sample that cannot be read is counted, named in the log and replaced by the next readable one, so that a run
    goes on and every layout sees the same replacement.

    Args:
        folder: folder of .tar shards, or the store of them.
        extensions: the members to decode; samples that lack one are left out. None decodes all.
        shards: names of the shards of ``folder`` to use, which are scanned; None takes all, by the folder's index.
        sample_filter: which samples to take; None takes all.

    Raises:
        UserError: the folder is missing or has no usable sample.
    """

    def __init__(
        self,
        folder: Path | ShardStore,
        extensions: list[str] | None = None,
        shards: list[str] | None = None,
        sample_filter: SampleFilter | None = None,
    ) -> None:
        self.store = LocalStore(folder) if isinstance(folder, Path) else folder
        self.folder = str(folder)
        self._index_paths: list[Path] = []  # an index of chosen shards is in no file
        if shards is None:
            self.index = open_index(self.store, sample_filter)
            self._index_paths = self.store.index_paths(index_name(sample_filter))
        else:
            chosen = [shard for shard in self.store.shards() if shard.name in shards]
            self.index = index_shards(self.store, chosen, sample_filter)
        self.bucketing: Bucketing | None = None  # of the images; None leaves them as they are
        self.skipped = 0
        self._expected: dict[int, list[Future[bytes]]] = {}
        self.restrict(extensions)
        if sample_filter is not None:
            self._warn_of_a_filter_that_always_holds(sample_filter)

    def restrict(self, extensions: list[str] | None, bucketing: Bucketing | None = None) -> None:
        """Decode these members only and leave out the samples that lack one, and those of no bucket; None decodes all.

        Raises:
            UserError: no sample is left.
        """
        self.extensions = extensions
        self.wanted: set[str] | None = None  # of the members that a sample happens to have; None decodes all
        self.shapes: dict[str, tuple[int, ...]] = {}
        wanted = set(extensions or ())
        self.keep(lambda members: wanted <= provided(members), ", ".join(extensions or ["any"]), bucketing)

    def keep(
        self,
        is_usable: Callable[[set[str]], bool],
        needed: str,
        bucketing: Bucketing | None = None,
    ) -> None:
        """Leave out the samples whose members are not usable, and those of no bucket; warnings count them.

        With a bucketing the samples are numbered anew: those of the first bucket come first.

        Args:
            is_usable: takes the extensions of a sample's members.
            needed: says which members a usable sample has.

        Raises:
            UserError: no sample is left.
        """
        passing = len(Selection.of_kinds(self.index, lambda members: LEFT_OUT not in members))

        def is_wanted(members: set[str]) -> bool:
            return LEFT_OUT not in members and is_usable(members)

        kinds = [set(kind.members) for kind in self.index.kinds if LEFT_OUT not in kind.members]
        self.selections = [Selection.of_kinds(self.index, is_wanted)]
        if not passing and len(self.index):
            raise NoSamplesError(
                f"data.filter takes none of the {len(self.index)} samples in {self.folder}; change it."
            )
        damaged = next((shard for shard in self.index.shards if shard.damage not in ("", NO_SAMPLES)), None)
        if not len(self.index) and damaged is not None:
            raise NoSamplesError(
                f"The shards in {self.folder} hold no samples; {damaged.name} is damaged: {damaged.damage}."
            )
        if not len(self):
            raise NoSamplesError(
                f"The shards in {self.folder} hold no samples with members {needed}; {what_to_do(kinds)}."
            )
        left_out = passing - len(self)
        if bucketing is not None:
            self._divide(BucketCounts(self.index, is_wanted, bucketing, self._index_paths))
        if left_out:
            logger.warning(
                "%d of the %d samples in %s have no members %s; left out%s.",
                left_out,
                passing,
                self.folder,
                needed,
                apart([kind for kind in kinds if not is_usable(kind)], is_usable),
            )

    def _warn_of_a_filter_that_always_holds(self, sample_filter: SampleFilter) -> None:
        # A comparison with a name that no sample has, or with a value of another type, does not hold; its `not` always does.
        left_out = sum(kind.samples for kind in self.index.kinds if LEFT_OUT in kind.members)
        if len(self.index) and not left_out:
            logger.warning(
                "data.filter %s takes all %d samples in %s; if it should not, look at the names and the types of their JSON.",
                sample_filter.text,
                len(self.index),
                self.folder,
            )

    def _divide(self, counts: BucketCounts) -> None:
        usable, bucketing = len(self), counts.bucketing
        self.selections, self.bucketing = counts.selections(), bucketing
        what = (
            "precomputed in none of the sizes"
            if bucketing.pixels_per_latent
            else "of no size that can be told"
        )
        causes = [
            (counts.too_small, "smaller than their bucket (data.upscale=true enlarges them)"),
            (counts.in_none, what),
        ]
        told = " and ".join(f"{number} are {cause}" for number, cause in causes if number)
        sizes = ", ".join(map(str, bucketing.buckets))
        if not len(self):
            raise NoSamplesError(
                f"None of the {usable} samples in {self.folder} is of one of the buckets {sizes}: {told}; change data.buckets, or "
                "the data."
            )
        if told:
            logger.warning(
                "Of the %d samples in %s %s; left out of the buckets %s.", usable, self.folder, told, sizes
            )

    def require_shapes_of_first(self) -> None:
        """From now on take a sample whose arrays differ in shape from the first sample's for unreadable."""
        arrays = {name: value for name, value in self[0].items() if isinstance(value, np.ndarray)}
        shapes = {"image" if name in IMAGES else name: array.shape for name, array in arrays.items()}
        if len(self.selections) > 1:  # those of a bucket have its size
            shapes = {
                name: shape for name, shape in shapes.items() if name not in ("image", LATENTS, LOG_VARIANCE)
            }
        self.shapes = shapes

    def __len__(self) -> int:
        return sum(map(len, self.selections))

    def place(self, index: int) -> tuple[int, int]:
        """Return the number of a sample's bucket (0 if there are none), and the sample's number in it."""
        inside = index
        for bucket, selection in enumerate(self.selections):
            if inside < len(selection):
                return bucket, inside
            inside -= len(selection)
        raise IndexError(index)

    def members(self, index: int) -> list[str]:
        """Return the extensions of a sample's members, as the index has them; nothing is read."""
        return self.index.kinds[int(self._record(index)["kind"])].members

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(index, lambda sample: sample)

    def read(
        self,
        index: int,
        use: Callable[[dict[str, Any]], dict[str, Any]],
        note: Callable[[int, Exception], None] | None = None,
        view: View = MIDDLE,
    ) -> dict[str, Any]:
        """Return what ``use`` makes of a sample, or of the next one that can be read and of which it makes something.

        The next one is of the same bucket.

        Args:
            use: raises ValueError for a sample that it cannot use.
            note: called with the index of every sample that cannot be read or used, and why; None warns of it.
            view: which part of a picture is seen where it is cut to a bucket.

        Raises:
            UserError: there is no such sample.
        """
        bucket, inside = self.place(index)
        size = len(self.selections[bucket])
        for attempt in range(size):
            number = index - inside + (inside + attempt) % size
            try:
                return use(self.decoded(number, view=view))
            except (OSError, ValueError) as error:
                why = error
                (note or self.warn)(number, error)
        raise UserError(
            f"None of the {size} samples{self._in(bucket)} in {self.folder} can be read (the last: {why}); build the data again."
        )

    def _in(self, bucket: int) -> str:
        """Return which bucket it is as a part of a sentence."""
        return f" of {self.bucketing.buckets[bucket]}" if self.bucketing and len(self.selections) > 1 else ""

    def warn(self, index: int, error: Exception) -> None:
        """Count a sample that cannot be used, and say why."""
        self.skipped += 1
        logger.warning(
            "Sample %s of %s cannot be read (%s); skipped, %d so far.",
            self.name(index), self.shard(index), error, self.skipped,
        )  # fmt: skip

    def decoded(self, index: int, extensions: list[str] | None = None, view: View = MIDDLE) -> dict[str, Any]:
        """Return this sample and no other.

        Args:
            extensions: decode those of these members that it has; None decodes what the data set is asked for.

        Raises:
            OSError: it cannot be read.
            ValueError: it cannot be decoded.
        """
        key, contents = self.contents(index)
        if extensions is None:
            present = [name for name in contents if self.wanted is None or name in self.wanted]
            extensions = self.extensions or present
        else:
            extensions = [name for name in extensions if name in contents]
        return {"__key__": key, **{name: self._member(contents, name, index, view) for name in extensions}}

    def name(self, index: int) -> str:
        """Return a sample's key, or its number if its headers cannot be read."""
        try:
            return self.contents(index)[0]
        except (OSError, ValueError):
            return str(index)

    def shard(self, index: int) -> str:
        """Return the shard of a sample."""
        return self.store.path(self._place(index)[0])

    def expect(self, indices: list[int]) -> None:
        """Begin to read samples that will be asked for next, where the store does that in the background."""
        for index in indices:
            if index not in self._expected:
                shard, extents = self._place(index)
                coming = [self.store.read_later(shard, *extent) for extent in extents]
                if None not in coming:
                    self._expected[index] = [each for each in coming if each is not None]

    def _place(self, index: int) -> tuple[str, list[tuple[int, int]]]:
        """Return the shard of a sample, and offset and size of each of its pieces there."""
        record = self._record(index)
        return self.index.shards[int(record["shard"])].name, self.index.extents(record)

    def contents(self, index: int) -> tuple[str, dict[str, memoryview]]:
        """Read a sample's members, those that lie side by side in one go; returns its key and their contents by extension.

        Members that it shares with another sample of its shard are read there.

        Raises:
            OSError: it cannot be read.
            ValueError: it is damaged.
        """
        shard, extents = self._place(index)
        coming = self._expected.pop(index, None)
        key, members = "", dict[str, memoryview]()
        for number, extent in enumerate(extents):
            content = coming[number].result() if coming is not None else self.store.read(shard, *extent)
            piece_key, piece_members = _parsed(memoryview(content), *extent)
            if number and piece_key != key:
                raise ValueError(f"a member of {piece_key} lies where one of {key} should")
            key, members = piece_key, members | piece_members
        if (shared := members.pop(SHARED, None)) is not None:
            other = _other_place(bytes(shared))
            _, others = _parsed(memoryview(self.store.read(shard, *other)), *other)
            members = {
                name: others[name] for name in (TEXT_HIDDEN_STATES, TEXT_POOLED) if name in others
            } | members
        return key, members

    def _record(self, index: int) -> np.void:
        """Return a sample's record of the index, whose file may be damaged."""
        bucket, inside = self.place(index)
        record = self.index.records[self.selections[bucket][inside]]
        if not self.index.is_sound(record):
            raise UserError(
                f"The index of {self.folder} is damaged at sample {index}; remove its {INDEX} and start again."
            )
        return record

    def size(self, index: int) -> tuple[int, int]:
        """Return width and height of a sample's upright picture or latents, as the index has them; 0 if it cannot tell."""
        record = self._record(index)
        return int(record["width"]), int(record["height"])

    def _image(self, content: bytes, index: int, view: View) -> np.ndarray:
        if self.bucketing is None:
            return decode_image(content)
        bucket = self.bucketing.buckets[self.place(index)[0]]
        return decode_image(content, bucket, self.bucketing.upscale, view)

    def _member(self, contents: dict[str, memoryview], extension: str, index: int, view: View) -> Any:
        """Decode a member of a sample."""
        if extension not in contents:
            raise ValueError(f"{extension}: no such member")
        kind, size = extension.rsplit(".", 1)[-1], len(contents[extension])
        if size > (most := MAX_TEXT.get(kind, size)):
            raise ValueError(f"{extension}: {size} bytes, more than the {most} that are read")
        content = bytes(contents[extension])
        try:
            value = self._image(content, index, view) if kind in IMAGES else DECODERS[kind](content)
        except Exception as error:  # on damaged content the libraries raise nearly anything
            raise ValueError(f"{extension}: {error}") from error
        shape = self.shapes.get("image" if kind in IMAGES else extension)
        if shape is not None and value.shape != shape:
            raise ValueError(f"{extension} has shape {value.shape}, the first sample's {shape}")
        return value


def _parsed(content: memoryview, offset: int, size: int) -> tuple[str, dict[str, memoryview]]:
    """Return the key of a piece read at ``offset`` and its members' contents by extension."""
    if len(content) != size:
        raise ValueError("cut off")
    piece = parse(content, offset)
    return piece.key, {
        name: content[start - offset :][:length]
        for name, (start, length) in piece.members.items()
        if name.rsplit(".", 1)[-1] in MEMBERS
    }


def _other_place(content: bytes) -> tuple[int, int]:
    """Return offset and size of the sample that another one shares members with."""
    place = DECODERS["json"](content)
    offset, size = (place.get("offset"), place.get("size")) if isinstance(place, dict) else (None, None)
    if (
        not isinstance(offset, int)
        or not isinstance(size, int)
        or not (0 <= offset < 1 << 48 and 0 < size < 1 << 32)
    ):
        raise ValueError(f"{SHARED}: no place of a sample")
    return offset, size
