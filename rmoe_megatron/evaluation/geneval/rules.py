"""GenEval's rules: from the objects that were detected in an image to right or wrong.

Colour and place are asked of the ``count`` detections of a class with the highest scores; ``exclude`` forbids ``count`` or more.
The protocol ``official`` is the published code's, to the letter; ``fixed`` repairs what its ``QUIRKS`` name.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rmoe_megatron.evaluation.geneval.prompts import Metadata, Requirement
from rmoe_megatron.evaluation.protocol import Protocol

POSITION_MARGIN = 0.1  # of the sum of both boxes' sizes
MIN_DIRECTION = 0.5  # of an offset along an axis, over the offset's length
NO_OFFSET = 1e-3  # pixels


QUIRKS = [
    "colour and place are asked of the most confident detections only: a right object behind a confident wrong one does not count",
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
    detected: dict[str, list[Detection]], metadata: Metadata, color_of: ColorOf, protocol: Protocol
) -> Verdict:
    """Judge the objects of an image.

    Args:
        detected: by class, those with the highest scores first.
        color_of: asked only where a prompt names a colour.
    """
    reasons: list[str] = []
    matched: list[list[Detection] | None] = []
    for requirement in metadata["include"]:
        found, problem = _match(
            detected.get(requirement["class"], []), requirement, matched, color_of, protocol
        )
        matched.append(found)
        if problem:
            reasons.append(problem)
    for requirement in metadata.get("exclude", []):
        number = len(detected.get(requirement["class"], []))
        if number >= requirement["count"]:
            reasons.append(f"expected {requirement['class']}<{requirement['count']}, found {number}")
    return Verdict(not reasons, "\n".join(reasons))


def _match(
    candidates: list[Detection],
    requirement: Requirement,
    matched: list[list[Detection] | None],
    color_of: ColorOf,
    protocol: Protocol,
) -> tuple[list[Detection] | None, str]:
    """Return the objects that satisfy a requirement, or None and why there are none."""
    name, count = requirement["class"], requirement["count"]
    if len(candidates) < count:
        return None, f"expected {name}>={count}, found {len(candidates)}"
    if protocol is Protocol.official:
        candidates = candidates[:count]
    if "color" in requirement:
        colors = color_of(candidates, name)
        candidates = [
            each for each, color in zip(candidates, colors, strict=True) if color == requirement["color"]
        ]
        if len(candidates) < count:
            seen = ", ".join(f"{colors.count(color)} {color}" for color in dict.fromkeys(colors))
            return (
                None,
                f"expected {requirement['color']} {name}>={count}, found {len(candidates)}; and {seen}",
            )
    if "position" not in requirement:
        return candidates[:count], ""
    relation, target = requirement["position"]
    others = matched[target]
    if others is None:
        return None, f"no target for {name} to be {relation}"
    placed = [
        each
        for each in candidates
        if all(relation in relations(each.box, other.box, protocol) for other in others)
    ]
    if len(placed) < count:
        first = relations(candidates[0].box, others[0].box, protocol)
        return None, f"expected {name} {relation} target, found {' and '.join(sorted(first))} target"
    return placed[:count], ""


def relations(
    box: tuple[float, ...], other: tuple[float, ...], protocol: Protocol = Protocol.official
) -> set[str]:
    """Return how ``box`` lies relative to ``other``: left of, right of, above, below, or nothing clear."""
    corners = np.array([box[:4], other[:4]], dtype=float).reshape(2, 2, 2)
    centers, sizes = corners.mean(axis=1), np.abs(np.diff(corners, axis=1))[:, 0]
    offset = centers[0] - centers[1]
    margin = POSITION_MARGIN * (sizes[0] + sizes[1])
    reduced = np.maximum(np.abs(offset) - margin, 0) * np.sign(offset)
    if (np.abs(reduced) < NO_OFFSET).all():
        return set()
    x, y = reduced / np.linalg.norm(offset if protocol is Protocol.official else reduced)
    directions = {"left of": -x, "right of": x, "above": -y, "below": y}
    return {name for name, share in directions.items() if share > MIN_DIRECTION}


def keep_most_confident(detections: list[Detection], threshold: float, most: int) -> list[Detection]:
    """Return the detections with a score above ``threshold``, the highest first, at most so many.

    Nothing is left out for overlapping another one: the published setting of that is 1.
    """
    # Ascending and turned round, as published: of equal scores the later comes first.
    order = np.argsort([each.score for each in detections])[::-1]
    return [detections[index] for index in order if detections[index].score > threshold][:most]
