"""Compares arms of an experiment on the same test grids: differences with a paired bootstrap, and the rule of refutation.

See ``README.md`` beside this file for the rule, which was fixed before any run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
CLAIMED = ("loop + supervision", "paper + supervision")

# Whether each test grid is right, bool [grids], by seed.
Verdicts = Mapping[int, NDArray[np.bool_]]


@dataclass(frozen=True)
class Difference:
    """How much larger an arm's share of right grids is than the reference's.

    Attributes:
        error: standard error over seeds and grids; None with fewer than two seeds in common.
    """

    mean: float
    error: float | None
    seeds: int

    @property
    def exceeds(self) -> bool:
        """Whether it is positive by more than two standard errors."""
        return self.error is not None and self.mean > 2 * self.error


def difference(arm: Verdicts, reference: Verdicts, seed: int = 0) -> Difference | None:
    """Return the mean difference over the seeds that both have, paired by seed and grid; None without such a seed.

    Args:
        seed: the seed of the bootstrap's draws.
    """
    common = sorted(set(arm) & set(reference))
    if not common:
        return None
    paired = np.stack([arm[each].astype(np.float64) - reference[each] for each in common])
    if len(common) < 2:
        return Difference(float(paired.mean()), None, 1)
    rng, (seeds, grids) = np.random.default_rng(seed), paired.shape
    of_grids = rng.multinomial(grids, np.full(grids, 1 / grids), size=DRAWS) / grids
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=DRAWS) / seeds
    drawn = ((of_grids @ paired.T) * of_seeds).sum(axis=1)
    return Difference(float(paired.mean()), float(drawn.std(ddof=1)), seeds)


def verdict(differences: Mapping[str, Difference | None]) -> str:
    """Return what the rule says of the arms that it names, in one sentence."""
    found = {arm: differences.get(arm) for arm in CLAIMED}
    lacking = [arm for arm, each in found.items() if each is None or each.error is None]
    if lacking:
        return f"The rule decides nothing: {_both(lacking)} {_have(lacking)} fewer than two seeds in common with the reference."
    helped = [arm for arm, each in found.items() if each is not None and each.exceeds]
    if len(helped) == len(CLAIMED):
        return f"Recursion is shown to help: {_both(helped)} exceed the reference by more than two standard errors."
    if helped:
        other = [arm for arm in CLAIMED if arm not in helped]
        return (
            f"Recursion is not shown to help: {_both(helped)} exceeds the reference by more than two standard errors, "
            f"{_both(other)} does not."
        )
    return f"Recursion is not shown to help: neither {' nor '.join(CLAIMED)} exceeds the reference by more than two standard errors."


def _both(arms: Sequence[str]) -> str:
    return " and ".join(f"`{arm}`" for arm in arms)


def _have(arms: Sequence[str]) -> str:
    return "have" if len(arms) > 1 else "has"
