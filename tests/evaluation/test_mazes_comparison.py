"""The paired bootstrap against the closed form of a mean's error, and what the rule says."""

import numpy as np
import pytest

from rmoe_megatron.evaluation.mazes.comparison import Difference, difference, verdict


def test_the_error_of_one_certain_seed_is_that_of_a_mean_over_grids() -> None:
    """Seeds that are all alike leave the grids: sqrt(p (1 - p) / n) of differences that are 0 or 1."""
    rng = np.random.default_rng(0)
    mine, none = rng.random(400) < 0.3, np.zeros(400, dtype=bool)
    found = difference({0: mine, 1: mine, 2: mine}, {0: none, 1: none, 2: none})
    assert found is not None
    share = mine.mean()
    assert found.mean == pytest.approx(share)
    assert found.error == pytest.approx(np.sqrt(share * (1 - share) / 400), rel=0.05)
    assert found.exceeds


def test_seeds_that_differ_widen_the_error() -> None:
    """Two seeds, all right and all wrong: a bootstrap mean is 0, 1/2 or 1 with 1/4, 1/2, 1/4, of deviation sqrt(1/8)."""
    one, none = np.ones(50, dtype=bool), np.zeros(50, dtype=bool)
    found = difference({0: one, 1: none}, {0: none, 1: none})
    assert found is not None
    assert found.mean == 0.5
    assert found.error == pytest.approx(np.sqrt(1 / 8), rel=0.03)
    assert not found.exceeds


def test_differences_are_paired_by_seed_and_grid() -> None:
    rng = np.random.default_rng(1)
    mine = {seed: rng.random(100) < 0.5 for seed in (0, 1, 2)}
    found = difference(mine, {**mine, 7: np.zeros(100, dtype=bool)})
    assert found == Difference(0.0, 0.0, 3)
    assert difference(mine, {7: mine[0]}) is None
    alone = difference({0: mine[0]}, {0: ~mine[0]})
    assert alone is not None
    assert (alone.error, alone.seeds) == (None, 1)
    assert alone.mean == pytest.approx(2 * mine[0].mean() - 1)


GOOD, BAD, UNSURE = Difference(0.5, 0.1, 3), Difference(-0.5, 0.1, 3), Difference(0.19, 0.1, 3)


@pytest.mark.parametrize(
    ("loop", "paper", "said"),
    [
        (GOOD, GOOD, "is shown to help: `loop + supervision` and `paper + supervision` exceed"),
        (GOOD, UNSURE, "not shown to help: `loop + supervision` exceeds .* `paper \\+ supervision` does not"),
        (BAD, GOOD, "not shown to help: `paper + supervision` exceeds .* `loop \\+ supervision` does not"),
        (UNSURE, BAD, "not shown to help: neither"),
        (GOOD, None, "decides nothing: `paper + supervision` has"),
        (
            Difference(0.9, None, 1),
            Difference(0.9, None, 1),
            "decides nothing: `loop + supervision` and `paper",
        ),
    ],
)
def test_the_rule(loop: Difference | None, paper: Difference | None, said: str) -> None:
    import re

    pattern = said.replace("`loop + s", "`loop \\+ s").replace("`paper + s", "`paper \\+ s")
    assert re.search(
        pattern, verdict({"loop + supervision": loop, "paper + supervision": paper, "loop": GOOD})
    )
