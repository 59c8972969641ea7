"""The order of a run's samples: computed for any draw, stored nowhere, near in space where it is near in time.

An epoch visits its blocks of consecutive samples in a new order, a window of blocks at a time, and mixes the samples inside a
window. So a loader touches few shards at a time, whatever the size of the data. Both permutations are Feistel networks whose
round function hashes a key (SplitMix64); on a domain that is no power of two the network is applied until the value is inside
("cycle walking", Black and Rogaway, 2002).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Protocol

_MASK = (1 << 64) - 1
_ROUNDS = 6


def _hash(value: int) -> int:
    """Return the finalizer of SplitMix64 of a value below 2**64."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


@lru_cache(maxsize=1024)
def _round_keys(key: tuple[int, ...]) -> tuple[int, ...]:
    state = 0
    for part in key:
        state = _hash(state ^ (part & _MASK))
    return tuple(_hash(state ^ number) for number in range(1, _ROUNDS + 1))


def permuted(position: int, size: int, *key: int) -> int:
    """Return where a permutation of ``range(size)`` takes ``position``; every ``key`` is another permutation.

    Args:
        position: from 0 to ``size - 1``.
        size: at least 1.
        key: integers, for instance seed, epoch and what the permutation is for.
    """
    bits = max((size - 1).bit_length(), 2)
    right_bits = bits // 2
    left_bits = bits - right_bits
    keys = _round_keys(key)
    while True:
        left, right = position >> right_bits, position & ((1 << right_bits) - 1)
        for number, round_key in enumerate(keys):
            # The halves take turns: an unbalanced network needs no swap.
            if number % 2:
                left ^= _hash(round_key ^ right) & ((1 << left_bits) - 1)
            else:
                right ^= _hash(round_key ^ left) & ((1 << right_bits) - 1)
        position = left << right_bits | right
        if position < size:
            return position


class Order(Protocol):
    """Which sample each draw of a run takes; any draw can be asked for, in the same time."""

    def __getitem__(self, draw: int) -> int:
        """Return the number of the sample of a draw."""
        ...


@dataclass(frozen=True)
class GlobalOrder:
    """The order of one data set: in every epoch each sample once, in a new order if shuffled.

    Args:
        num_samples: at least 1.
        window: samples that are mixed with each other; a data set that is no larger is shuffled as a whole.
        block: consecutive samples that stay in one window.
    """

    num_samples: int
    shuffle: bool
    seed: int
    window: int = 1 << 18
    block: int = 1 << 12

    def __getitem__(self, draw: int) -> int:
        """Return the index of the sample of a draw."""
        epoch, position = divmod(draw, self.num_samples)
        if not self.shuffle:
            return position
        if self.num_samples <= self.window:
            return permuted(position, self.num_samples, self.seed, epoch)
        number, inside = divmod(position, self.window)
        first = number * self.window
        mixed = first + permuted(
            inside, min(self.window, self.num_samples - first), self.seed, epoch, 1 + number
        )
        slot, offset = divmod(mixed, self.block)
        whole_blocks = (
            self.num_samples // self.block
        )  # what is left comes last, and begins elsewhere in every epoch
        if slot < whole_blocks:
            slot = permuted(slot, whole_blocks, self.seed, epoch, 0)
        start = permuted(0, self.num_samples, self.seed, epoch, -1)
        return (start + slot * self.block + offset) % self.num_samples


@dataclass(frozen=True)
class Turns:
    """How streams take turns: each as often as its weight says, mixed; computed for any turn.

    A cycle is about ``CYCLE`` turns, in which a stream has those that its weight gives it up to the cycle's end and that it has
    not had before, so that none is ever more than one turn and a cycle from its share.

    Args:
        weights: the streams' weights, not negative and not all 0.
        key: integers, for instance seed and what the turns are for.
    """

    weights: tuple[int, ...]
    key: tuple[int, ...]
    CYCLE = 256

    def __getitem__(self, turn: int) -> tuple[int, int]:
        """Return the stream whose turn it is, and how many turns it has had before."""
        cycle = turn // self.CYCLE
        while True:  # a cycle may be shorter by a turn a stream
            first, streams = _shuffled(self, cycle)
            if turn < first + len(streams):
                return streams[turn - first]
            cycle += 1

    def _before(self, cycle: int) -> list[int]:
        """Return the turns of every stream before a cycle."""
        total = sum(self.weights)
        return [cycle * self.CYCLE * weight // total for weight in self.weights]


@lru_cache(maxsize=64)
def _shuffled(turns: Turns, cycle: int) -> tuple[int, list[tuple[int, int]]]:
    """Return the first turn of a cycle, and its streams in their order, each with its turns so far."""
    before, after = turns._before(cycle), turns._before(cycle + 1)
    streams = [
        stream for stream, (old, new) in enumerate(zip(before, after, strict=True)) for _ in range(new - old)
    ]
    shuffled, had = [], list(before)
    for place in range(len(streams)):
        stream = streams[permuted(place, len(streams), *turns.key, cycle)]
        shuffled.append((stream, had[stream]))
        had[stream] += 1
    return sum(before), shuffled


class MixedOrder:
    """Several orders that take turns, each over samples of its own, which are numbered one order after the other.

    Args:
        orders: with the number of samples and the weight of each; orders without samples have no turns.
        key: integers that the turns depend on.
        group: draws of a turn.
    """

    def __init__(
        self, orders: Sequence[tuple[Order, int, int]], key: tuple[int, ...], group: int = 1
    ) -> None:
        self.orders, self.group = [order for order, _, _ in orders], group
        self.firsts = list(accumulate((samples for _, samples, _ in orders), initial=0))
        self.turns = Turns(tuple(weight if samples else 0 for _, samples, weight in orders), key)

    def __getitem__(self, draw: int) -> int:
        """Return the number of the sample of a draw."""
        turn, place = divmod(draw, self.group)
        stream, had = self.turns[turn]
        return self.firsts[stream] + self.orders[stream][had * self.group + place]
