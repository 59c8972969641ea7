"""The order of samples: permutations of every size, mixed well, local, and the same for any draw asked alone."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rmoe_megatron.data.order import GlobalOrder, permuted


@given(size=st.integers(1, 700), key=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=3))
def test_every_size_and_key_is_a_permutation(size: int, key: list[int]) -> None:
    assert sorted(permuted(position, size, *key) for position in range(size)) == list(range(size))


def test_positions_of_a_billion_stay_apart() -> None:
    size = 10**9 + 7
    drawn = [permuted(position, size, 3) for position in range(20_000)]
    assert len(set(drawn)) == len(drawn)
    assert min(drawn) >= 0
    assert max(drawn) < size


@pytest.mark.parametrize("size", [5, 64, 1000])
def test_where_a_sample_goes_is_uniform_over_seeds(size: int) -> None:
    """A chi-squared test of the place of one sample, and of the step from it to the next, over many keys."""
    keys = 40 * size
    places = np.array([[permuted(position, size, key) for position in (0, 1)] for key in range(keys)])
    counts = np.bincount(places[:, 0], minlength=size)
    assert stats.chisquare(counts).pvalue > 1e-4
    steps = np.bincount((places[:, 1] - places[:, 0]) % size, minlength=size)
    assert steps[0] == 0
    assert stats.chisquare(steps[1:]).pvalue > 1e-4


def test_successive_draws_are_uncorrelated() -> None:
    drawn = np.array([GlobalOrder(10_000, shuffle=True, seed=5)[draw] for draw in range(10_000)])
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(drawn, np.arange(10_000))[0, 1]) < 0.05


@settings(deadline=None)
@given(
    num_samples=st.integers(1, 600),
    blocks=st.integers(1, 6),
    block=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
def test_an_epoch_has_every_sample_once(num_samples: int, blocks: int, block: int, seed: int) -> None:
    order = GlobalOrder(num_samples, shuffle=True, seed=seed, window=blocks * block, block=block)
    epochs = [[order[epoch * num_samples + i] for i in range(num_samples)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(num_samples)) for epoch in epochs)


def test_every_epoch_is_another_permutation_and_every_seed() -> None:
    orders = [GlobalOrder(1000, shuffle=True, seed=seed, window=160, block=20) for seed in (0, 1)]
    epochs = [
        tuple(order[draw] for draw in range(start, start + 1000)) for order in orders for start in (0, 1000)
    ]
    assert len(set(epochs)) == 4
    assert [orders[0][draw] for draw in reversed(range(1000))] == list(reversed(epochs[0]))


@pytest.mark.parametrize("size", [10, 1000, 1 << 18])
def test_a_data_set_that_fits_one_window_has_another_order_in_every_epoch(size: int) -> None:
    order = GlobalOrder(size, shuffle=True, seed=4)
    first = range(min(size, 100))
    epochs = [[order[epoch * size + position] for position in first] for epoch in range(3)]
    assert all(
        sum(a == b for a, b in zip(*pair, strict=True)) < 8 for pair in itertools.combinations(epochs, 2)
    )


def test_unshuffled_draws_count() -> None:
    order = GlobalOrder(7, shuffle=False, seed=3)
    assert [order[draw] for draw in range(16)] == [draw % 7 for draw in range(16)]


def test_a_window_touches_few_blocks_and_mixes_them() -> None:
    order = GlobalOrder(100_000, shuffle=True, seed=1, window=1000, block=100)
    for window in (0, 17, 98):
        drawn = np.array([order[draw] for draw in range(window * 1000, (window + 1) * 1000)])
        # Ten runs of a hundred neighbours; the end of the data may cut one in two.
        gaps = np.flatnonzero(np.diff(np.sort(drawn)) > 1)
        assert len(gaps) <= 10
        runs = [len(run) for run in np.split(np.sort(drawn), gaps + 1)]
        assert all(length % 100 == 0 for length in runs) or len(runs) == 11
        neighbours = sum(abs(a - b) == 1 for a, b in itertools.pairwise(drawn.tolist()))
        assert neighbours < 20
