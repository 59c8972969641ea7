"""Streams take turns as their weights say; data sets and buckets have epochs of their own, under any layout."""

from collections import Counter
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rmoe_megatron.config.buckets import Bucket
from rmoe_megatron.config.run import MixedDatasetConfig
from rmoe_megatron.data.loader import BatchLayout, batches
from rmoe_megatron.data.mixture import Mixture, shares
from rmoe_megatron.data.order import GlobalOrder, MixedOrder, Turns
from rmoe_megatron.data.shards.bucketing import Bucketing
from rmoe_megatron.data.training_dataset import SampleFormat, TrainingDataset
from rmoe_megatron.errors import UserError
from tests.data.test_bucketing import write_raw
from tests.data.test_index import picture
from tests.support.runs import array, write_shard


@settings(deadline=None)
@given(
    weights=st.lists(st.integers(0, 1000), min_size=1, max_size=20).filter(any),
    start=st.integers(0, 10**12),
    key=st.integers(0, 9),
)
def test_turns_are_the_weights(weights: list[int], start: int, key: int) -> None:
    turns = Turns(tuple(weights), (key,))
    taken = [turns[turn] for turn in range(start, start + 600)]
    had: dict[int, int] = {}
    for stream, before in taken:
        assert before == had.get(stream, before), "a stream's turns are not one after the other"
        had[stream] = before + 1
    total = sum(weights)
    for stream, turn in had.items():
        share = Fraction((start + 600) * weights[stream], total)
        assert abs(turn - share) <= Turns.CYCLE + len(weights) + 1
    # From the first turn on, nothing is left out.
    first = Counter(turns[turn][0] for turn in range(5000))
    for stream, weight in enumerate(weights):
        assert abs(first[stream] - 5000 * weight / total) <= Turns.CYCLE * weight / total + len(weights) + 2


def test_every_stream_is_drawn_in_epochs_of_its_own() -> None:
    sizes, group = (5, 40, 11), 4
    orders = [(GlobalOrder(size, True, 3), size, size) for size in sizes]
    mixed = MixedOrder(orders, (3,), group)
    drawn = [mixed[draw] for draw in range(4000)]
    assert drawn[1234:1250] == [mixed[draw] for draw in range(1234, 1250)]
    firsts = (0, 5, 45)
    for first, size in zip(firsts, sizes, strict=True):
        mine = [number for number in drawn if first <= number < first + size]
        for epoch in range(len(mine) // size):
            assert sorted(mine[epoch * size : (epoch + 1) * size]) == list(range(first, first + size))
    for start in range(0, 4000, group):  # a group is of one stream
        streams = {sum(number >= first for first in firsts) for number in drawn[start : start + group]}
        assert len(streams) == 1


BUCKETS = (Bucket(16, 8), Bucket(8, 8), Bucket(8, 16))
SETS = {"a": [(16, 8)] * 9 + [(8, 8)] * 13 + [(8, 16)] * 2, "b": [(8, 8)] * 7 + [(20, 9)] * 5}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    folder = tmp_path_factory.mktemp("sets")
    for name, sizes in SETS.items():
        write_raw(folder / name, sizes)
    taken = SampleFormat(bucketing=Bucketing(BUCKETS), divides=True)
    datasets = [TrainingDataset(folder / name, taken) for name in SETS]
    return Mixture(datasets, [Fraction(3), Fraction(1)])


def key(mixture: Mixture, index: int) -> tuple[str, str, str]:
    dataset, inside = mixture.place(index)
    return (
        Path(dataset.samples.folder).name,
        Path(dataset.samples.shard(inside)).name,
        dataset.samples.name(inside),
    )


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_buckets_of_several_sets_are_the_same_under_any_layout(mixture: Mixture, data: st.DataObject) -> None:
    global_batch = 8
    group = data.draw(st.sampled_from([4, 8]), "group")
    order = mixture.order(True, data.draw(st.integers(0, 99), "seed"), group=group)
    steps, drawn, sizes = 12, list[int](), list[tuple[int, ...]]()
    while len(drawn) < steps * global_batch:
        ranks = data.draw(st.sampled_from([1, 2, 4]), "ranks")
        micro_batch = data.draw(
            st.sampled_from([each for each in (1, 2, 4) if each * ranks <= group]), "micro batch"
        )
        here = data.draw(st.integers(1, steps - len(drawn) // global_batch), "steps")
        workers = data.draw(st.sampled_from([0] * 19 + [2]), "workers")
        loaded = []
        for rank in range(ranks):
            layout = BatchLayout(global_batch, micro_batch, rank, ranks)
            loader = batches(mixture, order, layout, first_draw=len(drawn), num_workers=workers)
            loaded.append(list(islice(loader, here * layout.micro_batches_per_step)))
        for place in zip(*loaded, strict=True):  # at every place all ranks have pictures of one size
            assert len({batch["image"].shape for batch in place}) == 1
            for batch in place:
                assert batch["draw_index"].tolist() == list(range(len(drawn), len(drawn) + micro_batch))
                drawn += [order[draw] for draw in batch["draw_index"].tolist()]
                sizes.append(tuple(batch["image"].shape[2:]))
    assert len(set(sizes)) > 1


def test_shares_buckets_and_epochs_are_exact(mixture: Mixture) -> None:
    order, draws = mixture.order(True, 5, group=4), 48_000
    numbers = Counter(order[draw] for draw in range(draws))
    counts = {key(mixture, number): count for number, count in numbers.items()}
    folders = {
        name: sum(count for (folder, _, _), count in counts.items() if folder == name) for name in SETS
    }
    assert folders["a"] == pytest.approx(draws * 3 / 4, abs=1024)
    assert len(counts) == len(numbers) == sum(map(len, SETS.values()))  # none starves
    for name, sizes in SETS.items():
        mine = [count for (folder, _, _), count in counts.items() if folder == name]
        expected = folders[name] / len(sizes)
        assert max(mine) - min(mine) <= 0.1 * expected
    assert [mixture.size(bucket) for bucket in mixture.buckets] == [14, 20, 2]


def test_shares_by_weight_and_by_epochs(mixture: Mixture) -> None:
    """A set of 24 samples and one of 12."""
    by_weight = tuple(MixedDatasetConfig(name, weight=weight) for name, weight in (("a", 0.25), ("b", 3.0)))
    assert shares(by_weight, mixture.datasets) == [Fraction(1, 4), 3]
    by_epochs = tuple(MixedDatasetConfig(name, epochs=epochs) for name, epochs in (("a", 1.0), ("b", 4.0)))
    assert shares(by_epochs, mixture.datasets) == [24, 48]
    order = Mixture(mixture.datasets, shares(by_epochs, mixture.datasets)).order(True, 0)
    seen = Counter(key(mixture, order[draw])[0] for draw in range(7200))
    assert seen["b"] / 12 == pytest.approx(4 * seen["a"] / 24, rel=0.1)  # four times as often each


def test_another_stage_has_another_order(mixture: Mixture) -> None:
    first, second = mixture.order(True, 5, stage=0), mixture.order(True, 5, stage=1)
    assert [first[draw] for draw in range(20)] != [second[draw] for draw in range(20)]


def test_one_set_of_one_bucket_is_in_the_order_of_one_set(tmp_path: Path) -> None:
    write_raw(tmp_path, [(8, 8)] * 20)
    alone = Mixture([TrainingDataset(tmp_path, SampleFormat())], [Fraction(7)])
    assert alone.order(True, 9) == GlobalOrder(20, True, 9)


def test_precomputed_and_raw_samples_do_not_mix(tmp_path: Path) -> None:
    write_shard(tmp_path / "raw" / "0.tar", [{"jpg": picture(8, 8), "cls": b"0"}])
    write_shard(tmp_path / "encoded" / "0.tar", [{"latents.npy": array(np.zeros((3, 8, 8))), "cls": b"0"}])
    datasets = [TrainingDataset(tmp_path / name, SampleFormat(num_classes=1)) for name in ("raw", "encoded")]
    with pytest.raises(UserError, match="raw samples and .* precomputed ones"):
        Mixture(datasets, [Fraction(1), Fraction(1)])
