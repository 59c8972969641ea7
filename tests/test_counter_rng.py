"""Counter-based random numbers: distributions against scipy's, independence of streams, and of how they are drawn."""

import math

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


WORD = (1 << 64) - 1


def by_hand(key: int, *indices: int) -> int:
    """A derived key in whole numbers: the finalizer of SplitMix64 (Steele, Lea, Flood, 2014) of key and index."""
    for index in indices:
        key = finalized((key * 0x9E3779B97F4A7C15 + index * 0xD1342543DE82EF95 + 1) & WORD)
    return key


def finalized(value: int) -> int:
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & WORD
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & WORD
    return value ^ value >> 31


def uniform_by_hand(key: int, number: int) -> float:
    """Number ``number``, from 0 on, of a key: SplitMix64's next but so many, its upper 23 bits in the middle of their step."""
    return ((finalized((key + (number + 1) * 0x9E3779B97F4A7C15) & WORD) >> 41) + 0.5) / (1 << 23)


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**62])
@pytest.mark.parametrize("draw", [0, 7, 2**40 + 3])
def test_numbers_are_those_of_splitmix64_by_hand(seed: int, draw: int) -> None:
    """Streams are a promise: a resumed run, and one with another version of this file, draws the same."""
    key = by_hand(draw, seed, Purpose.gumbel, 3, 1)
    keys = derive(sample_keys(seed, torch.tensor([draw])), Purpose.gumbel, 3, 1)
    assert keys.tolist() == [key - (1 << 64) if key >> 63 else key]
    uniforms = [uniform_by_hand(key, number) for number in range(12)]
    assert uniform(keys, 12)[0].tolist() == uniforms  # exact in float32
    assert uniform(keys, 5, first=4)[0].tolist() == uniforms[4:9]
    double_exponentials = [-math.log(-math.log(value)) for value in uniforms]
    assert gumbel(keys, 12)[0].tolist() == pytest.approx(double_exponentials, rel=1e-4, abs=1e-5)
    assert gumbel(keys, 3, first=2)[0].tolist() == pytest.approx(double_exponentials[2:5], rel=1e-4, abs=1e-5)
    for count in (1, 5, 6):
        half = (count + 1) // 2
        radii = [math.sqrt(-2 * math.log(value)) for value in uniforms[:half]]
        angles = [2 * math.pi * value for value in uniforms[half : 2 * half]]
        pairs = list(zip(radii, angles, strict=True))
        expected = [r * math.cos(a) for r, a in pairs] + [r * math.sin(a) for r, a in pairs]
        assert normal(keys, count)[0].tolist() == pytest.approx(expected[:count], rel=1e-4, abs=1e-5)


def test_keys_keep_their_shape() -> None:
    keys = sample_keys(0, torch.arange(6, dtype=torch.int32)).view(2, 3)
    assert keys.dtype == torch.int64
    assert derive(keys, 1).shape == (2, 3)
    assert [draw(keys, 5).shape for draw in (uniform, normal, gumbel)] == [(2, 3, 5)] * 3
    assert {draw(keys, 5).dtype for draw in (uniform, normal, gumbel)} == {torch.float32}
