"""GenEval's rules on thousands of random scenes against a judge written from the protocol's text, in fractions."""

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from rmoe_megatron.evaluation.geneval.prompts import Metadata
from rmoe_megatron.evaluation.geneval.rules import Detection, judge, keep_most_confident
from rmoe_megatron.evaluation.rule_set import RuleSet

NAMES, PAINTS = ("cat", "dog", "cow"), ("red", "blue")
PLACES = ("left of", "right of", "above", "below")
SCENES = 4000
TEXT_THRESHOLD = 0.3

Scene = dict[str, list[tuple[Detection, str]]]


def scene(rng: np.random.Generator) -> Scene:
    """Objects on a coarse lattice, so that offsets and thresholds are met exactly, with a colour each."""
    objects: Scene = {}
    steps = iter(rng.permutation(40) - 8)
    for name in NAMES:
        for _ in range(rng.integers(0, 5)):
            left, top, width, height = (int(each) for each in rng.integers([0, 0, 1, 1], [8, 8, 4, 4]) * 5)
            # All scores differ, and some are the threshold.
            score = np.float32(TEXT_THRESHOLD) + np.float32(0.01) * np.float32(next(steps))
            found = Detection((left, top, left + width, top + height), float(score))
            objects.setdefault(name, []).append((found, str(rng.choice(PAINTS))))
    return objects


def metadata(rng: np.random.Generator) -> Metadata:
    include: list[dict[str, Any]] = []
    for number in range(rng.integers(1, 4)):
        requirement: dict[str, Any] = {"class": str(rng.choice(NAMES)), "count": int(rng.integers(1, 3))}
        if rng.random() < 0.4:
            requirement["color"] = str(rng.choice(PAINTS))
        if number and rng.random() < 0.6:
            requirement["position"] = [str(rng.choice(PLACES)), int(rng.integers(number))]
        include.append(requirement)
    exclude = (
        [{"class": str(rng.choice(NAMES)), "count": int(rng.integers(1, 4))}] if rng.random() < 0.3 else []
    )
    return {"tag": "position", "prompt": "x", "include": include, "exclude": exclude}  # type: ignore[typeddict-item]


def lies(place: str, one: Detection, other: Detection, repaired: bool) -> bool | None:
    """Whether the place is one's relative to another; None where both sides of the comparison are the same number."""
    boxes = [[Fraction(edge) for edge in each.box] for each in (one, other)]
    offset, margin = [], []
    for axis in (0, 1):
        centers = [(each[axis] + each[axis + 2]) / 2 for each in boxes]
        offset.append(centers[0] - centers[1])
        margin.append(sum(each[axis + 2] - each[axis] for each in boxes) / 10)
    left = [max(abs(way) - part, Fraction(0)) for way, part in zip(offset, margin, strict=True)]
    if not any(left):
        return False
    axis = PLACES.index(place) // 2
    if (offset[axis] < 0) != (PLACES.index(place) % 2 == 0):
        return False
    length = sum(each**2 for each in (left if repaired else offset))
    return None if 4 * left[axis] ** 2 == length else 4 * left[axis] ** 2 > length


class UndecidedError(Exception):
    """The scene lies on a threshold, where the rounding of float32 decides."""


def satisfies(
    groups: list[tuple[tuple[Detection, str], ...]], include: list[dict[str, Any]], repaired: bool
) -> bool:
    """Whether groups of objects, one for every requirement, have its colour and its place."""
    for group, requirement in zip(groups, include, strict=True):
        if "color" in requirement and any(paint != requirement["color"] for _, paint in group):
            return False
        if "position" in requirement:
            place, target = requirement["position"]
            answers = [lies(place, one, other, repaired) for one, _ in group for other, _ in groups[target]]
            if None in answers:
                raise UndecidedError
            if not all(answers):
                return False
    return True


def expected(objects: Scene, wanted: Metadata, repaired: bool) -> bool:
    """Judge by the text: every requirement is satisfied, by the best objects or by any, and nothing excluded is there."""
    kept = {}
    for name, found in objects.items():
        confident = [each for each in found if np.float32(each[0].score) > np.float32(TEXT_THRESHOLD)]
        kept[name] = sorted(confident, key=lambda each: -each[0].score)[:16]
    for requirement in wanted.get("exclude", []):
        if len(kept.get(requirement["class"], [])) >= requirement["count"]:
            return False
    choices = []
    for requirement in wanted["include"]:
        candidates = kept.get(requirement["class"], [])
        if len(candidates) < requirement["count"]:
            return False
        best = [tuple(candidates[: requirement["count"]])]
        choices.append(list(itertools.combinations(candidates, requirement["count"])) if repaired else best)
    return any(satisfies(list(groups), wanted["include"], repaired) for groups in itertools.product(*choices))  # type: ignore[arg-type]


@pytest.mark.parametrize("protocol", list(RuleSet))
def test_random_scenes(protocol: RuleSet) -> None:
    rng = np.random.default_rng(20)
    verdicts = []
    for number in range(SCENES):
        objects, wanted = scene(rng), metadata(rng)
        paints = {id(found): paint for group in objects.values() for found, paint in group}
        try:
            right = expected(objects, wanted, repaired=protocol is RuleSet.fixed)
        except UndecidedError:
            continue
        detected = {
            name: keep_most_confident([found for found, _ in group], TEXT_THRESHOLD, 16)
            for name, group in objects.items()
        }
        verdict = judge(
            detected, wanted, lambda asked, name, paints=paints: [paints[id(each)] for each in asked], protocol
        )  # fmt: skip
        assert verdict.correct is right, (number, wanted, objects, verdict)
        assert bool(verdict.reason) is not right
        verdicts.append(right)
    assert len(verdicts) > 0.9 * SCENES
    assert 0.1 < np.mean(verdicts) < 0.9
