"""Counter-based random numbers: distributions against scipy's, independence of streams, and of how they are drawn."""

import pytest
import torch
from scipy import stats

from rmoe_megatron.counter_rng import Purpose, derive, gumbel, normal, sample_keys, uniform


@pytest.mark.parametrize(
    ("draw", "distribution"), [(uniform, "uniform"), (normal, "norm"), (gumbel, "gumbel_r")]
)
def test_distribution(draw, distribution: str) -> None:  # type: ignore[no-untyped-def]
    values = draw(sample_keys(3, torch.arange(64)), 4096).double().flatten().numpy()
    assert stats.kstest(values, distribution).pvalue > 1e-3


def test_uniform_never_reaches_its_ends() -> None:
    values = uniform(sample_keys(0, torch.arange(2000)), 5000)
    assert values.min() > 0
    assert values.max() < 1
    assert torch.isfinite(gumbel(sample_keys(0, torch.arange(2000)), 5000)).all()


def test_streams_are_uncorrelated() -> None:
    keys = sample_keys(0, torch.arange(40))
    streams = torch.cat([normal(derive(keys, purpose), 4096) for purpose in Purpose])
    correlation = torch.corrcoef(streams.double()) - torch.eye(len(streams))
    assert correlation.abs().max() < 6 / 4096**0.5


def test_a_sample_has_the_same_numbers_in_any_batch() -> None:
    together = normal(derive(sample_keys(1, torch.arange(8)), Purpose.noise), 33)
    alone = normal(derive(sample_keys(1, torch.tensor([5])), Purpose.noise), 33)
    assert torch.equal(together[5:6], alone)


def test_seed_purpose_and_sample_all_matter() -> None:
    first = normal(derive(sample_keys(0, torch.arange(2)), Purpose.noise), 8)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, normal(derive(sample_keys(1, torch.arange(2)), Purpose.noise), 8))
    assert not torch.equal(first, normal(derive(sample_keys(0, torch.arange(2)), Purpose.timestep), 8))
