"""Several data sets drawn from in turn: which draw takes which sample of which."""

from fractions import Fraction
from math import lcm
from typing import Any

from rmoe_megatron.config.run import MixedDatasetConfig
from rmoe_megatron.data.order import GlobalOrder, MixedOrder, Order
from rmoe_megatron.data.training_dataset import BadSample, TrainingDataset
from rmoe_megatron.errors import UserError


class Mixture:
    """The samples of some data sets, by numbers that run through the buckets, and in a bucket through the data sets.

    Args:
        datasets: data sets of the same kind of samples, with the same buckets.
        shares: how much of the draws each has beside the others.

    Raises:
        UserError: they are of several kinds.
    """

    def __init__(self, datasets: list[TrainingDataset], shares: list[Fraction]) -> None:
        self.datasets = datasets
        first = datasets[0]
        other = next((each for each in datasets if each.kind != first.kind), None)
        if other is not None:
            raise UserError(
                f"{first.samples.folder} holds {first.kind} samples and {other.samples.folder} {other.kind} ones; mix data sets "
                "of one kind."
            )
        self.buckets = range(len(datasets[0].sizes))
        # Of a bucket in a data set: its share of all draws, whole numbers with one denominator.
        exact = [
            [share * size / len(dataset) for size in dataset.sizes]
            for dataset, share in zip(datasets, shares, strict=True)
        ]
        denominator = lcm(*(weight.denominator for weights in exact for weight in weights))
        self.weights = [[int(weight * denominator) for weight in weights] for weights in exact]
        self._firsts = [
            [sum(dataset.sizes[:bucket]) for bucket in self.buckets] for dataset in datasets
        ]  # in the data set's own numbers

    def __len__(self) -> int:
        return sum(map(len, self.datasets))

    def order(self, shuffle: bool, seed: int, stage: int = 0, group: int = 1) -> Order:
        """Return the order of a run's draws: each data set and bucket in epochs of its own, as often as its share says.

        Args:
            stage: the run's stage; another one has another order.
            group: draws in a row that are of one bucket.
        """
        key = seed + (stage << 32)
        of_buckets = []
        for bucket in self.buckets:
            sizes = [dataset.sizes[bucket] for dataset in self.datasets]
            orders = [
                (GlobalOrder(size, shuffle, key), size, weights[bucket])
                for size, weights in zip(sizes, self.weights, strict=True)
            ]
            # One data set needs no turns.
            order: Order = orders[0][0] if len(orders) == 1 else MixedOrder(orders, (key, bucket))
            weight = sum(weights[bucket] for weights in self.weights)
            of_buckets.append((order, sum(sizes), weight))
        return of_buckets[0][0] if len(of_buckets) == 1 else MixedOrder(of_buckets, (key, -1), group)

    def draw(self, index: int, draw: int, bad: list[BadSample] | None = None) -> dict[str, Any]:
        """Return a sample as a draw of the run sees it; see :meth:`TrainingDataset.draw`."""
        dataset, inside = self.place(index)
        return dataset.draw(inside, draw, bad)

    def expect(self, indices: list[int]) -> None:
        """Begin to read samples that will be asked for next, where their store does that in the background."""
        for dataset, inside in map(self.place, indices):
            dataset.samples.expect([inside])

    def place(self, index: int) -> tuple[TrainingDataset, int]:
        """Return the data set of a sample and its number there."""
        for bucket in self.buckets:
            for dataset, firsts in zip(self.datasets, self._firsts, strict=True):
                if index < dataset.sizes[bucket]:
                    return dataset, firsts[bucket] + index
                index -= dataset.sizes[bucket]
        raise IndexError(index)

    def size(self, bucket: int) -> int:
        """Return the number of samples of a bucket."""
        return sum(dataset.sizes[bucket] for dataset in self.datasets)


def shares(mixed: tuple[MixedDatasetConfig, ...], datasets: list[TrainingDataset]) -> list[Fraction]:
    """Return the shares of the draws that weights or epochs give; epochs count by the samples of their data set."""
    return [
        Fraction(each.weight) if each.weight is not None else Fraction(each.epochs or 1) * len(dataset)
        for each, dataset in zip(mixed, datasets, strict=True)
    ]
