"""Which samples of an index are of which bucket: counted once, then found by their numbers without a list of them."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from rmoe_megatron.config.buckets import Bucket
from rmoe_megatron.data.shards.index import BLOCK, Index, Selection, wanted_kinds
from rmoe_megatron.files import atomic

logger = logging.getLogger(__name__)

_CHUNK = 256 * BLOCK  # records that are looked at at once
TOO_SMALL, NO_BUCKET = -1, -2


@dataclass(frozen=True)
class Bucketing:
    """How samples come into buckets.

    A raw picture comes into the bucket of the nearest aspect ratio (in the logarithm), of several with that ratio into the
    largest that it need not be enlarged for. Precomputed latents have the size of a bucket or come into none.

    Attributes:
        buckets: from the widest to the tallest, of one aspect ratio the smallest first.
        upscale: enlarge what is smaller than its bucket; otherwise it comes into none.
        pixels_per_latent: None for raw pictures.
    """

    buckets: tuple[Bucket, ...]
    upscale: bool = False
    pixels_per_latent: int | None = None

    def assign(self, width: np.ndarray, height: np.ndarray) -> np.ndarray:
        """Return the number of every sample's bucket, TOO_SMALL or NO_BUCKET: int8 of the shape of both arguments.

        Args:
            width: widths of pictures or latents, 0 where it is not known; ``height`` likewise.
        """
        number = np.full(width.shape, NO_BUCKET, np.int8)
        if self.pixels_per_latent is not None:
            width, height = width * self.pixels_per_latent, height * self.pixels_per_latent
            for place, bucket in enumerate(self.buckets):
                number[(width == bucket.width) & (height == bucket.height)] = place
            return number
        known = (width > 0) & (height > 0)
        ratio = np.log(np.where(known, width, 1) / np.where(known, height, 1))
        ratios = np.unique([np.log(bucket.aspect_ratio) for bucket in self.buckets])
        nearest = ratios[np.searchsorted((ratios[1:] + ratios[:-1]) / 2, ratio)]
        for place, bucket in enumerate(self.buckets):
            here = known & (nearest == np.log(bucket.aspect_ratio))
            fits = (width >= bucket.width) & (height >= bucket.height)
            number[here & (number == NO_BUCKET)] = place if self.upscale else TOO_SMALL
            number[here & fits] = place
        return number

    def of(self, width: int, height: int) -> int:
        """Return the number of one sample's bucket, TOO_SMALL or NO_BUCKET."""
        return int(self.assign(np.array([width]), np.array([height]))[0])


class BucketCounts:
    """How many samples of some kinds every block of an index has in every bucket.

    They lie beside the index, and are counted when they are missing or of an index that has changed since.

    Args:
        is_wanted: takes the extensions of a sample's members.
        paths: where the file of the index may be; empty for an index that has no file.

    Attributes:
        counts: uint16 [blocks, buckets + 2]; the last two are in no bucket, and too small.
    """

    def __init__(
        self, index: Index, is_wanted: Callable[[set[str]], bool], bucketing: Bucketing, paths: list[Path]
    ) -> None:
        self.index, self.bucketing, self.kinds = index, bucketing, wanted_kinds(index, is_wanted)
        digest = hashlib.sha256(json.dumps(asdict(bucketing)).encode()).hexdigest()[:16]
        self.paths = [path.with_name(f"{path.name}-buckets-{digest}") for path in paths]
        self.shape = (len(index.block_counts), len(bucketing.buckets) + 2)
        self.counts = self._stored()

    def selections(self) -> list[Selection]:
        """Return the samples of each bucket."""
        return [
            Selection(self.index, self.counts[:, place], partial(self._are_of, place))
            for place in range(len(self.bucketing.buckets))
        ]

    @property
    def too_small(self) -> int:
        """Return how many samples would have to be enlarged."""
        return int(self.counts[:, TOO_SMALL].sum(dtype=np.int64))

    @property
    def in_none(self) -> int:
        """Return how many samples have a size that is not known or none of the buckets'."""
        return int(self.counts[:, NO_BUCKET].sum(dtype=np.int64))

    def _are_of(self, bucket: int, records: np.ndarray) -> np.ndarray:
        return self._numbers(records) == bucket

    def _numbers(self, records: np.ndarray) -> np.ndarray:
        """Return the bucket of every record; of one that is not wanted a number that no bucket has."""
        # A copy: fields of a mapped file are read once, and become integers that can be multiplied.
        width, height = records["width"].astype(np.int64), records["height"].astype(np.int64)
        numbers = self.bucketing.assign(width, height)
        return np.where(self.kinds[records["kind"]], numbers, np.int8(-3))

    def _count(self) -> np.ndarray:
        counts = np.zeros(self.shape, np.uint16)
        for start in range(0, len(self.index), _CHUNK):
            numbers = self._numbers(self.index.records[start : start + _CHUNK])
            first = start // BLOCK
            blocks = first + np.arange(len(numbers)) // BLOCK
            taken = numbers >= NO_BUCKET
            # The last two columns are those of -1 and -2, as an index from the end has it.
            columns = numbers[taken].astype(np.int64) % self.shape[1]
            flat = np.bincount(blocks[taken] * self.shape[1] + columns - first * self.shape[1])
            part = np.zeros((blocks[-1] - first + 1) * self.shape[1], np.uint16)
            part[: len(flat)] = flat
            counts[first : blocks[-1] + 1] = part.reshape(-1, self.shape[1])
        return counts

    def _stored(self) -> np.ndarray:
        """Return the counts from beside the index, where they are put if they are not there."""
        identity = self._identity()
        for path in self.paths:
            try:
                with path.open("rb") as file:
                    found = file.read(len(identity)) == identity
                if found:
                    return np.memmap(path, np.uint16, "r", offset=len(identity), shape=self.shape)
            except (OSError, ValueError):
                continue  # counting costs time, no more
        counts, why = self._count(), None
        for path in self.paths:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic.writing(path) as unfinished:
                    unfinished.write_bytes(identity + counts.tobytes())
            except OSError as error:
                why = error.strerror
            else:
                return counts
        if why is not None:
            logger.warning(
                "The buckets of %s cannot be written (%s); every start counts them.", self.index.folder, why
            )
        return counts

    def _identity(self) -> bytes:
        """Return what the counts depend on, as 32 bytes."""
        shards = [asdict(shard) for shard in self.index.shards]
        kinds = [
            [kind.members, wanted] for kind, wanted in zip(self.index.kinds, self.kinds.tolist(), strict=True)
        ]
        described = json.dumps([shards, kinds, asdict(self.bucketing)])
        return hashlib.sha256(described.encode()).digest()
