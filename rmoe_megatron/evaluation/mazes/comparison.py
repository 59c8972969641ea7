"""Compares arms of an experiment on the same test grids: differences with a paired bootstrap, and the rule of refutation.

See ``README.md`` beside this file for the rule, which was fixed before any run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rmoe_megatron.evaluation.results import bootstrap_error

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


def difference(arm: Verdicts, reference: Verdicts) -> Difference | None:
    """Return the mean difference over the seeds that both have, paired by seed and grid; None without such a seed."""
    common = sorted(set(arm) & set(reference))
    if not common:
        return None
    paired = np.stack([arm[each].astype(np.float64) - reference[each] for each in common])
    if len(common) < 2:
        return Difference(float(paired.mean()), None, 1)

    def mean(seeds: NDArray[np.int64], grids: NDArray[np.int64], axis: int) -> NDArray[np.float64]:
        return paired[seeds[..., :, None], grids[..., None, :]].mean(axis=(-2, -1))

    error = bootstrap_error([np.arange(size) for size in paired.shape], mean)
    return Difference(float(paired.mean()), error, len(common))


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
