"""GenEval's rules: from the objects that were detected in an image to right or wrong.

Colour and place are asked of the ``count`` detections of a class with the highest scores; ``exclude`` forbids ``count`` or more.
The protocol ``official`` is the published code's, to the letter; ``fixed`` repairs what its ``QUIRKS`` name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from rmoe_megatron.evaluation.geneval.prompts import COLORS, POSITIONS, Metadata, Requirement
from rmoe_megatron.evaluation.rule_set import RuleSet

POSITION_MARGIN = 0.1  # of the sum of both boxes' sizes
MIN_DIRECTION = 0.5  # of an offset along an axis, over the offset's length
NO_OFFSET = 1e-3  # pixels


QUIRKS = [
    "colour and place are asked of the most confident detections only: a right object behind a confident wrong one does not count, "
    "and a position's target is the most confident one too",
    "the offset of two boxes is shrunk by a tenth of their sizes but divided by its length before that, so that close objects "
    "have no direction at all",
]


@dataclass(frozen=True, eq=False)
class Detection:
    """An object: box in pixels as [left, top, right, bottom], the detector's score, and a mask bool [H, W]."""

    box: tuple[float, float, float, float]
    score: float
    mask: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether an image satisfies its prompt, and if not, why."""

    correct: bool
    reason: str


# From detections of one class and its name to the colour of each.
ColorOf = Callable[[list[Detection], str], list[str]]


def judge(
    detected: dict[str, list[Detection]], metadata: Metadata, color_of: ColorOf, protocol: RuleSet
) -> Verdict:
    """Judge the objects of an image.

    Args:
        detected: by class, those with the highest scores first.
        color_of: asked only where a prompt names a colour.
    """
    requirements = metadata["include"]
    if protocol is RuleSet.official:
        reasons = _problems(detected, requirements, color_of)
    else:
        reasons = _repaired_problems(detected, requirements, color_of)
    for requirement in metadata.get("exclude", []):
        number = len(detected.get(requirement["class"], []))
        if number >= requirement["count"]:
            reasons.append(f"expected {requirement['class']}<{requirement['count']}, found {number}")
    return Verdict(not reasons, "\n".join(reasons))


def _problems(
    detected: dict[str, list[Detection]], requirements: list[Requirement], color_of: ColorOf
) -> list[str]:
    """Return what is missing, with every requirement asked of the most confident objects, as the published code does."""
    reasons = []
    matched: list[list[Detection] | None] = []
    for requirement in requirements:
        name, count = requirement["class"], requirement["count"]
        found = detected.get(name, [])[:count]
        colors = color_of(found, name) if "color" in requirement and len(found) == count else []
        problem = _number_or_color_problem(requirement, len(found), colors)
        if problem is None and "position" in requirement:
            problem = _position_problem(requirement, found, matched[requirement["position"][1]])
        matched.append(found if problem is None else None)
        if problem is not None:
            reasons.append(problem)
    return reasons


def _number_or_color_problem(requirement: Requirement, number: int, colors: list[str]) -> str | None:
    """Return what is wrong with the number of objects, or with their colours if there are any."""
    name, count, color = requirement["class"], requirement["count"], requirement.get("color")
    if number < count:
        return f"expected {name}>={count}, found {number}"
    if color is not None and colors.count(color) < count:
        seen = ", ".join(f"{colors.count(each)} {each}" for each in COLORS if each in colors)
        return f"expected {color} {name}>={count}, found {colors.count(color)} {color}; and {seen}"
    return None


def _position_problem(
    requirement: Requirement, found: list[Detection], targets: list[Detection] | None
) -> str | None:
    """Return what is wrong with the place of the first object and target that are not in relation."""
    name, relation = requirement["class"], requirement["position"][0]
    if targets is None:
        return f"no target for {name} to be {relation}"
    for each in found:
        for target in targets:
            seen = relations(each.box, target.box)
            if relation not in seen:
                # The published code prints a set, in any order.
                said = " and ".join(place for place in POSITIONS if place in seen)
                return f"expected {name} {relation} target, found {said} target"
    return None


def _repaired_problems(
    detected: dict[str, list[Detection]], requirements: list[Requirement], color_of: ColorOf
) -> list[str]:
    """Return what is missing if any objects of a class will do, also as targets of a position."""
    reasons: list[str] = []
    candidates: list[list[Detection]] = []
    for number, requirement in enumerate(requirements):
        found, color = detected.get(requirement["class"], []), requirement.get("color")
        colors = color_of(found, requirement["class"]) if color is not None and found else []
        problem = _number_or_color_problem(requirement, len(found), colors)
        if colors:
            found = [each for each, seen in zip(found, colors, strict=True) if seen == color]
        candidates.append(found)
        if problem is None and "position" in requirement:
            problem = _repaired_position_problem(requirements[: number + 1], candidates)
        if problem is not None:
            reasons.append(problem)
            candidates[number] = []
    return reasons


def _repaired_position_problem(
    requirements: list[Requirement], candidates: list[list[Detection]]
) -> str | None:
    """Return what is wrong with the place of the last requirement if no choice of objects has all of them in place."""
    name, (relation, target) = requirements[-1]["class"], requirements[-1]["position"]
    if not candidates[target]:
        return f"no target for {name} to be {relation}"
    first = target
    while "position" in requirements[first]:
        first = requirements[first]["position"][1]
    choices = combinations(candidates[first], requirements[first]["count"])
    if any(_have_all_in_place(first, chosen, requirements, candidates) for chosen in choices):
        return None
    seen = relations(candidates[-1][0].box, candidates[target][0].box, RuleSet.fixed)
    said = " and ".join(place for place in POSITIONS if place in seen)
    return f"expected {name} {relation} target, found {said} target"


def _have_all_in_place(
    number: int,
    chosen: tuple[Detection, ...],
    requirements: list[Requirement],
    candidates: list[list[Detection]],
) -> bool:
    """Whether objects that are chosen for a requirement have those around them that refer to it, and these theirs."""
    for other, requirement in enumerate(requirements):
        if "position" not in requirement or requirement["position"][1] != number or not candidates[other]:
            continue
        relation = requirement["position"][0]
        placed = [
            each
            for each in candidates[other]
            if all(relation in relations(each.box, target.box, RuleSet.fixed) for target in chosen)
        ]
        choices = combinations(placed, requirement["count"])
        if not any(_have_all_in_place(other, choice, requirements, candidates) for choice in choices):
            return False
    return True


def relations(
    box: tuple[float, ...], other: tuple[float, ...], protocol: RuleSet = RuleSet.official
) -> set[str]:
    """Return how ``box`` lies relative to ``other``: left of, right of, above, below, or nothing clear."""
    # In float32, as the detector's boxes are.
    corners = np.array([box[:4], other[:4]], dtype=np.float32).reshape(2, 2, 2)
    centers, sizes = corners.mean(axis=1), np.abs(np.diff(corners, axis=1))[:, 0]
    offset = centers[0] - centers[1]
    margin = POSITION_MARGIN * (sizes[0] + sizes[1])
    reduced = np.maximum(np.abs(offset) - margin, 0) * np.sign(offset)
    if (np.abs(reduced) < NO_OFFSET).all():
        return set()
    x, y = reduced / np.linalg.norm(offset if protocol is RuleSet.official else reduced)
    directions = {"left of": -x, "right of": x, "above": -y, "below": y}
    return {name for name, share in directions.items() if share > MIN_DIRECTION}


def keep_most_confident(detections: list[Detection], threshold: float, most: int) -> list[Detection]:
    """Return the detections with a score above ``threshold``, the highest first, at most so many.

    Scores and threshold are compared in float32, as the detector's scores are. Nothing is left out for overlapping another one: the
    published setting of that is 1.
    """
    scores = np.array([each.score for each in detections], dtype=np.float32)
    # Ascending and turned round, as published: of equal scores the later comes first.
    return [detections[index] for index in np.argsort(scores)[::-1] if scores[index] > np.float32(threshold)][
        :most
    ]
