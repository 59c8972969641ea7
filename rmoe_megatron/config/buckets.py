"""The sizes that pictures are cut to: ``data.buckets``."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from rmoe_megatron.config.run import BucketsConfig
from rmoe_megatron.errors import UserError

MAX_BUCKETS = 64
_SIZE = re.compile(r"(?P<width>[1-9][0-9]{0,4})x(?P<height>[1-9][0-9]{0,4})")


@dataclass(frozen=True)
class Bucket:
    """The size of some pictures, in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def aspect_ratio(self) -> float:
        """Return width by height."""
        return self.width / self.height


def build_buckets(config: BucketsConfig, side: int) -> tuple[Bucket, ...]:
    """Return the buckets of a configuration, from the widest to the tallest, of one aspect ratio the smallest first.

    Args:
        side: pixels of a side of the model's square picture, whose number of pixels generated buckets do not exceed.

    Raises:
        UserError: a size is malformed or given twice, or there are too many.
    """
    buckets = [parse_bucket("data.buckets.sizes", size) for size in config.sizes] or _generated(config, side)
    ordered = sorted(buckets, key=lambda bucket: (-bucket.aspect_ratio, bucket.width))
    twice = next((str(first) for first, second in pairwise(ordered) if first == second), None)
    if twice is not None:
        raise UserError(f"data.buckets.sizes names {twice} twice; name each size once.")
    if not 0 < len(ordered) <= MAX_BUCKETS:
        raise UserError(
            f"data.buckets makes {len(ordered)} buckets of {side} x {side} pixels; between 1 and {MAX_BUCKETS} are possible: "
            "change data.buckets.multiple or max_aspect_ratio."
        )
    return tuple(ordered)


def parse_bucket(name: str, size: str) -> Bucket:
    """Return the size that ``WIDTHxHEIGHT`` is; ``name`` is where it is written.

    Raises:
        UserError: the text is no size.
    """
    match = _SIZE.fullmatch(size)
    if match is None:
        raise UserError(f"{name} has {size!r:.80}; write WIDTHxHEIGHT in pixels, as in 1216x832.")
    return Bucket(int(match["width"]), int(match["height"]))


def _generated(config: BucketsConfig, side: int) -> Iterable[Bucket]:
    """For every width the largest height within the number of pixels, and the other way round."""
    unit, budget, found = config.multiple, side * side, set()
    longest = math.isqrt(int(budget * config.max_aspect_ratio))
    for longer in range(-(-side // unit) * unit, longest + 1, unit):
        shorter = budget // longer // unit * unit
        if shorter and longer / shorter <= config.max_aspect_ratio:
            found |= {Bucket(longer, shorter), Bucket(shorter, longer)}
    return found
