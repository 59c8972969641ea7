"""GenEval's rules (arXiv 2310.11513): from detections and a prompt's requirements to right or wrong.

A requirement of ``include`` asks for at least ``count`` objects of a class. Its color and position are asked
of the ``count`` detections of that class with the highest scores. ``exclude`` forbids ``count`` or more objects
of a class. A relation holds if, along its axis, the offset of the box centers less a tenth of the boxes' summed
sizes is more than half of the centers' distance. These are GenEval's thresholds; they carry over to small images
because both are relative. On objects 11 pixels wide the first takes 2.2 pixels off.
"""

import math
from dataclasses import dataclass
from typing import Any

from rmoe_megatron.evaluation.shapes.detector import Detection

POSITION_MARGIN = 0.1  # of the sum of both boxes' sizes
MIN_DIRECTION = 0.5  # reduced offset along the relation's axis over the distance of the centers


@dataclass(frozen=True)
class Verdict:
    """Whether an image satisfies its prompt, and if not, why."""

    correct: bool
    reason: str


def judge(detections: list[Detection], requirements: dict[str, Any]) -> Verdict:
    """Judge an image's detections by the requirements of its prompt, in the form of GenEval's metadata."""
    ranked = sorted(detections, key=lambda item: -item.score)
    groups: list[list[Detection]] = []
    problems = []
    for entry in requirements["include"]:
        name, count = entry["class"], entry["count"]
        found = [item for item in ranked if item.shape == name][:count]
        groups.append(found if len(found) == count else [])
        if len(found) < count:
            problems.append(f"expected {count} {name}, found {len(found)}")
            continue
        color = entry.get("color")
        right_color = sum(item.color == color for item in found)
        if color is not None and right_color < count:
            problems.append(f"expected {count} {color} {name}, found {right_color}")
        elif "position" in entry:
            relation, target = entry["position"]
            if not groups[target]:
                problems.append(f"nothing for the {name} to be {relation}")
            elif not all(relation in relations(item, other) for item in found for other in groups[target]):
                problems.append(f"expected the {name} {relation} the {groups[target][0].shape}")
    for entry in requirements.get("exclude", []):
        found_count = sum(item.shape == entry["class"] for item in detections)
        if found_count >= entry["count"]:
            problems.append(f"expected fewer than {entry['count']} {entry['class']}, found {found_count}")
    return Verdict(not problems, "; ".join(problems))


def relations(item: Detection, other: Detection) -> set[str]:
    """Return how ``item`` lies relative to ``other``: left of, right of, above, below, or nothing clear."""
    length = math.hypot(item.x - other.x, item.y - other.y)
    if length == 0:
        return set()
    offset_x = _reduced(item.x - other.x, POSITION_MARGIN * (item.width + other.width))
    offset_y = _reduced(item.y - other.y, POSITION_MARGIN * (item.height + other.height))
    directions = {
        "left of": -offset_x / length,
        "right of": offset_x / length,
        "above": -offset_y / length,
        "below": offset_y / length,
    }
    return {name for name, share in directions.items() if share > MIN_DIRECTION}


def _reduced(offset: float, margin: float) -> float:
    return math.copysign(max(abs(offset) - margin, 0.0), offset)
