"""From answers to DPG-Bench's scores.

A proposition whose answer is yes is worth 1, unless one that it depends on is worth nothing. An image's score is the mean of its
propositions, a prompt's that of its images, the benchmark's that of its prompts.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rmoe_megatron.evaluation.dpg.questions import Item
from rmoe_megatron.evaluation.rule_set import RuleSet

QUIRKS = [
    "the first row of the table is not asked",
    "a prompt that depends on a proposition that is not there (as the first row is) is left out of every score",
    "categories are scored from the answers before dependencies are looked at, and from the last image of a prompt alone",
    "an item whose rows are in two blocks is asked the questions of the last block only",
    "an item with a dot in its name is left out, since the name of its picture is cut there",
    "run as several processes, the published script mixes the categories up: it joins those of every process in the order of its own set; "
    "the categories here are those of one process",
]

# Of one image: the answers by proposition, "yes" or anything else.
Answers = Mapping[int, str]


def worth(item: Item, answers: Answers) -> dict[int, float]:
    """Return what every proposition is worth; a parent is looked at as it stands, in the order of the table.

    Raises:
        KeyError: a parent is not there.
    """
    values = {number: float(answers[number] == "yes") for number in item.propositions}
    for number, proposition in item.propositions.items():
        if any(values[parent] == 0 for parent in proposition.parents):
            values[number] = 0.0
    return values


def score(items: Sequence[Item], answers: Sequence[Sequence[Answers]], protocol: RuleSet) -> dict[str, Any]:
    """Return the scores in percent: overall, by broad category (L1) and by detailed category (L2).

    Args:
        answers: for every item those of its images.
    """
    scores: list[float] = []
    left_out: list[str] = []
    by_category: dict[str, list[float]] = defaultdict(list)
    for item, of_images in zip(items, answers, strict=True):
        if protocol is RuleSet.official and "." in item.name:
            left_out.append(item.name)
            continue
        try:
            values = [
                worth(item if protocol is RuleSet.official else _known(item), each) for each in of_images
            ]
        except KeyError:
            left_out.append(item.name)
            continue
        scores.append(float(np.mean([np.mean(list(each.values())) for each in values])))
        counted = values
        if protocol is RuleSet.official:
            counted = [{number: float(of_images[-1][number] == "yes") for number in item.propositions}]
        for each in counted:
            for number, value in each.items():
                by_category[item.propositions[number].category].append(value)
    broad: dict[str, list[float]] = defaultdict(list)
    for category, values_of in by_category.items():
        broad[category.partition("-")[0].strip()] += values_of
    return {
        "overall": 100 * float(np.mean(scores)) if scores else None,
        "categories_l1": _percent(broad),
        "categories_l2": _percent(by_category),
        "prompts": len(scores),
        "prompts_left_out": left_out,
    }


def _known(item: Item) -> Item:
    """Return an item whose propositions depend on those only that are there."""
    kept = {
        number: type(each)(each.question, each.category, tuple(set(each.parents) & item.propositions.keys()))
        for number, each in item.propositions.items()
    }
    return Item(item.name, item.prompt, kept)


def _percent(groups: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: 100 * float(np.mean(values)) for name, values in sorted(groups.items())}
