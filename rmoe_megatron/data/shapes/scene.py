"""Scenes of the toy shapes set: what is in the picture, its caption, and what GenEval's rules will ask for.

A scene is drawn for one skill. The requirements have the form of GenEval's prompt metadata: every entry
of ``include`` asks for at least ``count`` objects of ``class`` (with ``color`` and ``position`` where the
caption names them; a position is [relation, index of the entry it refers to]); an entry of ``exclude``
forbids ``count`` or more objects of ``class``.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rmoe_megatron.data.shapes.render import ShapeObject
from rmoe_megatron.data.shapes.vocabulary import (
    COLORS,
    IMAGE_SIZE,
    NUMBERS,
    PLURALS,
    RELATIONS,
    SHAPES,
    Pair,
    Skill,
)

TEMPLATES = ("{}", "a photo of {}", "an image of {}", "a picture of {}")
CELL = (
    8  # pixels; every object lies in a cell of its own, for the set is about composition, not about drawing
)
GAP = 1.0  # pixels between the boxes of two objects, at least, so that components stay apart
SIZES = (6.0, 6.5, 7.0)  # sides of the objects' boxes in pixels
MAX_SLOPE = 0.4  # off-axis over on-axis distance of two objects in a position scene
_PLACEMENTS_PER_TRY = 128


@dataclass(frozen=True)
class Scene:
    """A picture's content and its caption, which always agree."""

    skill: Skill
    caption: str
    objects: tuple[ShapeObject, ...]
    requirements: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the scene as the JSON object that is stored beside the image."""
        return {
            "skill": self.skill.value,
            "caption": self.caption,
            "objects": [asdict(item) for item in self.objects],
            "requirements": self.requirements,
        }


def seen_pairs(heldout: frozenset[Pair]) -> list[Pair]:
    """Return all (color, shape) pairs that are not held out, in a fixed order."""
    return [(color, shape) for shape in SHAPES for color in COLORS if (color, shape) not in heldout]


def sample_scene(
    rng: np.random.Generator, skill: Skill, heldout: frozenset[Pair], use_heldout: bool
) -> Scene:
    """Draw a scene of a skill.

    With ``use_heldout`` the caption names at least one held-out (color, shape) pair (the skill must be
    one whose captions name colors); without it the picture has none.
    """
    seen = seen_pairs(heldout)
    first = _pick(rng, sorted(heldout) if use_heldout else seen)
    colored = use_heldout or bool(rng.integers(2))
    phrase = TEMPLATES[rng.integers(len(TEMPLATES))]
    if skill in (Skill.single_object, Skill.colors):
        colored = skill is Skill.colors
        pairs, include, exclude = [first], [_entry(first, 1, colored)], []
        text = f"a {_name(first, colored)}"
    elif skill is Skill.counting:
        count = int(rng.integers(1, 5))
        pairs, include = [first] * count, [_entry(first, count, colored)]
        exclude = [{"class": first[1], "count": count + 1}]
        text = f"{NUMBERS[count]} {_name(first, colored, plural=count > 1)}"
    else:
        distinct_colors = skill is Skill.color_attr
        others = [pair for pair in seen if pair[1] != first[1]]
        if distinct_colors:
            others = [pair for pair in others if pair[0] != first[0]]
        pairs = [first, _pick(rng, others)]
        if rng.integers(2):
            pairs.reverse()
        colored = distinct_colors or (skill is Skill.position and colored)
        names = [f"a {_name(pair, colored)}" for pair in pairs]
        include, exclude = [_entry(pair, 1, colored) for pair in pairs], []
        text = " and ".join(names)
    relation = None
    if skill is Skill.position:
        relation = RELATIONS[rng.integers(len(RELATIONS))]
        text = f"{names[0]} {relation} {names[1]}"
        include = [include[1], include[0] | {"position": [relation, 0]}]
    sizes, centers = _place(rng, len(pairs), relation)
    objects = tuple(
        ShapeObject(shape, color, round(float(x), 3), round(float(y), 3), round(float(size), 3))
        for (color, shape), (x, y), size in zip(pairs, centers, sizes, strict=True)
    )
    return Scene(skill, phrase.format(text), objects, {"include": include, "exclude": exclude})


def _pick(rng: np.random.Generator, pairs: list[Pair]) -> Pair:
    return pairs[rng.integers(len(pairs))]


def _name(pair: Pair, colored: bool, plural: bool = False) -> str:
    color, shape = pair
    noun = PLURALS[shape] if plural else shape
    return f"{color} {noun}" if colored else noun


def _entry(pair: Pair, count: int, colored: bool) -> dict[str, Any]:
    color, shape = pair
    entry: dict[str, Any] = {"class": shape, "count": count}
    return entry | {"color": color} if colored else entry


def _place(
    rng: np.random.Generator, count: int, relation: str | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draw sizes [count] and centers [count, 2] (x, y) of boxes in cells; the first has ``relation`` to the second."""
    cells = IMAGE_SIZE // CELL
    while True:
        sizes = rng.choice(SIZES, size=(_PLACEMENTS_PER_TRY, count))
        picked = rng.random((_PLACEMENTS_PER_TRY, cells * cells)).argsort(axis=1)[:, :count]
        corners = CELL * np.stack((picked % cells, picked // cells), axis=-1)
        slack = (CELL - GAP - sizes)[..., None]
        centers = corners + CELL / 2 + slack * (rng.integers(3, size=corners.shape) - 1) / 2
        if relation is None:
            return sizes[0], centers[0]
        hits = np.flatnonzero(_has_relation(centers[:, 0] - centers[:, 1], relation))
        if hits.size:
            return sizes[hits[0]], centers[hits[0]]


def _has_relation(offset: NDArray[np.float64], relation: str) -> NDArray[np.bool_]:
    """Tell whether offsets (x, y) [N, 2] point clearly into the relation's direction."""
    axis = 0 if relation in ("left of", "right of") else 1
    sign = -1 if relation in ("left of", "above") else 1
    along = sign * offset[:, axis]
    return (along > 0) & (np.abs(offset[:, 1 - axis]) <= MAX_SLOPE * along)
