"""Whether two models differ by more than chance, when both were asked the same prompts."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import permutation_test

RESAMPLES = 9999  # of the permutation test: its smallest p is 1 in 10,000
LEVEL = 0.05  # below which a difference counts as more than chance

# Scores by task and prompt. The score of a model is the mean of its tasks' means.
PromptScores = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two scores over the prompts that both have.

    Attributes:
        standard_error: the standard error of the difference, by the scatter of the prompts' differences; None where a task has a single prompt.
        p_value: how often a difference as large or larger comes about if every prompt's two scores change places by chance.
        prompts: in both; ``left_out`` those that only one has.
    """

    difference: float
    standard_error: float | None
    p_value: float
    prompts: int
    left_out: int

    @property
    def exceeds_error(self) -> bool:
        """Whether it is more than chance at the level of 5 %."""
        return self.p_value < LEVEL


def compare_by_prompt(one: PromptScores, other: PromptScores) -> PairedDifference | None:
    """Return by how much ``one`` scores higher than ``other``, None if no prompt is in both."""
    pairs = {
        task: [
            (score, other[task][prompt]) for prompt, score in scores.items() if prompt in other.get(task, {})
        ]
        for task, scores in one.items()
    }
    groups = [np.array(each, dtype=np.float64) for each in pairs.values() if each]
    if not groups:
        return None
    weights = np.concatenate([np.full(len(group), 1 / (len(groups) * len(group))) for group in groups])
    mine, theirs = np.concatenate(groups).T

    def difference(
        first: NDArray[np.float64], second: NDArray[np.float64], axis: int = -1
    ) -> NDArray[np.float64]:
        return ((first - second) * weights).sum(axis=axis)

    p_value = 1.0  # of a single prompt: the other sign is as likely
    if len(mine) > 1:
        tested = permutation_test(
            (mine, theirs), difference, permutation_type="samples", n_resamples=RESAMPLES, vectorized=True, batch=500,
            rng=np.random.default_rng(0),
        )  # fmt: skip
        p_value = float(tested.pvalue)
    variances = [
        np.var(group[:, 0] - group[:, 1], ddof=1) / len(group) if len(group) > 1 else np.nan
        for group in groups
    ]
    error = float(np.sqrt(np.sum(variances))) / len(groups)
    number = len(mine)
    everything = len(
        {(task, prompt) for scores in (one, other) for task in scores for prompt in scores[task]}
    )
    return PairedDifference(
        float(difference(mine, theirs)), None if np.isnan(error) else error, p_value, number, everything - number
    )  # fmt: skip
