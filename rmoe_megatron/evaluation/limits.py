"""A part of a benchmark's prompts, with its tasks in turn, and what becomes of a score that is of a part alone."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any


def take_in_turn(tasks: Sequence[Hashable], limit: int | None) -> tuple[int, ...] | None:
    """Return the numbers of so many prompts in ascending order, of each task in turn; None if that is all of them.

    Args:
        tasks: the task of every prompt.
    """
    if limit is None or limit >= len(tasks):
        return None
    earlier: dict[Hashable, int] = defaultdict(int)
    turns = []
    for number, task in enumerate(tasks):
        turns.append((earlier[task], number))
        earlier[task] += 1
    return tuple(sorted(number for _, number in sorted(turns)[:limit]))


def of_a_part(scores: dict[str, Any], chosen: Sequence[int] | None, everything: int) -> dict[str, Any]:
    """Return scores as they are, or of a part of the prompts under ``limited``: they are not the benchmark's."""
    if chosen is None:
        return scores
    return dict.fromkeys(scores) | {"limited": {"prompts": len(chosen), "of": everything} | scores}


def heading(results: dict[str, Any], whole: str) -> str:
    """Return what a table calls the main score: ``whole``, or of how many prompts it is."""
    limited = results.get("limited")
    return whole if limited is None else f"{limited['prompts']} of {limited['of']} prompts"


def main_score(results: dict[str, Any], name: str) -> Any:
    """Return a score of the whole benchmark, or where there is none that of the part."""
    return results["limited"][name] if results.get("limited") is not None else results[name]
