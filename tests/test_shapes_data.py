"""The toy shapes generator: areas in closed form, captions against scenes, held-out pairs, determinism, the shards."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset

from rmoe_megatron.data.shapes import build_shapes
from rmoe_megatron.data.shapes.build import SPLITS, make_scene
from rmoe_megatron.data.shapes.render import ShapeObject, coverage, render
from rmoe_megatron.data.shapes.scene import GAP, MARGIN, Scene
from rmoe_megatron.data.shapes.vocabulary import (
    BACKGROUND,
    COLOR_SKILLS,
    COLORS,
    HELDOUT_PAIRS,
    IMAGE_SIZE,
    PLURALS,
    SHAPES,
    Skill,
)
from rmoe_megatron.errors import UserError

HELDOUT = frozenset(HELDOUT_PAIRS)
NUMBER_WORDS = {"a": 1, "one": 1, "two": 2, "three": 3, "four": 4}
SINGULAR = {plural: shape for shape, plural in PLURALS.items()}
PHRASE = re.compile(r"\b(a|one|two|three|four) (?:(\w+) )?(" + "|".join([*PLURALS.values(), *SHAPES]) + r")\b")


def scenes(split: str, count: int, seed: int = 3) -> list[Scene]:
    return [make_scene(seed, split, index, HELDOUT) for index in range(count)]


def mentioned(caption: str) -> list[tuple[int, str | None, str]]:
    """Read (count, color, shape) back from a caption, in its order."""
    return [(NUMBER_WORDS[n], color or None, SINGULAR.get(noun, noun)) for n, color, noun in PHRASE.findall(caption)]


@pytest.mark.parametrize(
    ("shape", "share", "centroid"),
    [
        ("circle", math.pi / 4, 0.0),
        ("square", 1.0, 0.0),
        ("triangle", 1 / 2, 1 / 6),
        ("cross", 5 / 9, 0.0),
        ("diamond", 1 / 2, 0.0),
    ],
)
@pytest.mark.parametrize(("x", "y", "size"), [(16.0, 16.0, 12.0), (14.37, 17.81, 11.23)])
def test_area_and_centroid_are_those_of_the_closed_form(
    shape: str, share: float, centroid: float, x: float, y: float, size: float
) -> None:
    drawn = coverage(shape, x, y, size).astype(np.float64)
    area = drawn.sum()
    pixel_centers = np.arange(IMAGE_SIZE) + 0.5
    assert area == pytest.approx(share * size**2, rel=0.03)
    assert (drawn.sum(axis=0) @ pixel_centers) / area == pytest.approx(x, abs=0.1)
    assert (drawn.sum(axis=1) @ pixel_centers) / area == pytest.approx(y + centroid * size, abs=0.1)


def test_a_square_on_the_pixel_grid_is_exact() -> None:
    image = render([ShapeObject("square", "red", 10.0, 12.0, 8.0)])
    expected = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    expected[:] = BACKGROUND
    expected[8:16, 6:14] = COLORS["red"]
    np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("split", SPLITS)
def test_captions_agree_with_objects_and_requirements(split: str) -> None:
    for scene in scenes(split, 400):
        named = mentioned(scene.caption)
        assert sum(count for count, _, _ in named) == len(scene.objects), scene.caption
        for count, color, shape in named:
            matching = [o for o in scene.objects if o.shape == shape and color in (None, o.color)]
            assert len(matching) == count, scene.caption
        include = scene.requirements["include"]
        asked = Counter((entry["count"], entry.get("color"), entry["class"]) for entry in include)
        assert asked == Counter(named), scene.caption


@pytest.mark.parametrize("split", SPLITS)
def test_positions_in_the_picture_are_those_of_the_caption(split: str) -> None:
    seen = Counter()
    for scene in scenes(split, 600):
        relation = next((r for r in ("left of", "right of", "above", "below") if r in scene.caption), None)
        assert (relation is not None) == (scene.skill is Skill.position)
        if relation is None:
            continue
        (_, _, first), (_, _, second) = mentioned(scene.caption)
        where = {item.shape: item for item in scene.objects}
        dx, dy = where[first].x - where[second].x, where[first].y - where[second].y
        along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
        assert along > max(abs(dx), abs(dy)) - 1e-9
        seen[relation] += 1
    assert len(seen) == 4


@pytest.mark.parametrize("split", SPLITS)
def test_objects_keep_their_distance_from_each_other_and_the_border(split: str) -> None:
    rounding = 0.002
    for scene in scenes(split, 300):
        for i, item in enumerate(scene.objects):
            for center in (item.x, item.y):
                assert item.size / 2 + MARGIN - rounding <= center <= IMAGE_SIZE - item.size / 2 - MARGIN + rounding
            for other in scene.objects[:i]:
                apart = max(abs(item.x - other.x), abs(item.y - other.y)) - (item.size + other.size) / 2
                assert apart >= GAP - rounding


def test_heldout_pairs_are_never_shown_in_training_and_always_named_in_their_split() -> None:
    for split in ("train", "val"):
        shown = {(o.color, o.shape) for scene in scenes(split, 3000) for o in scene.objects}
        assert not shown & HELDOUT
        assert {shape for _, shape in shown} == set(SHAPES) and {color for color, _ in shown} == set(COLORS)
    for scene in scenes("val_heldout", 400):
        assert any((color, shape) in HELDOUT for _, color, shape in mentioned(scene.caption)), scene.caption


def test_validation_splits_are_balanced_over_their_skills() -> None:
    assert Counter(s.skill for s in scenes("val", 60)) == {skill: 10 for skill in Skill}
    assert Counter(s.skill for s in scenes("val_heldout", 40)) == {skill: 10 for skill in COLOR_SKILLS}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        build_shapes(tmp_path / name, train=30, val=8, seed=seed)
    first, second, third = (contents(tmp_path / name) for name in "abc")
    assert first == second
    assert first["train/shapes-000000.tar"] != third["train/shapes-000000.tar"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]  # no unfinished folder is left


def test_a_larger_set_starts_with_the_samples_of_a_smaller_one() -> None:
    assert scenes("train", 20) == scenes("train", 40)[:20]


def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    description = build_shapes(tmp_path / "set", train=1001, val=12, seed=0)
    assert json.loads((tmp_path / "set/dataset.json").read_text()) == description
    assert description["toy"] is True
    for split, expected in (("train", 1001), ("val", 12), ("val_heldout", 3)):
        shards = [str(tmp_path / "set" / name) for name in description["splits"][split]["shards"]]
        samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"))
        assert len(samples) == expected == description["splits"][split]["samples"]
        for index, sample in enumerate(samples):
            scene = make_scene(0, split, index, HELDOUT)
            assert sample["txt"] == scene.caption == sample["json"]["caption"]
            assert sample["json"] == json.loads(json.dumps(scene.to_json()))
            if index % 100 == 0:
                np.testing.assert_array_equal(sample["png"], render(scene.objects))


def test_a_folder_with_content_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(UserError, match="not empty"):
        build_shapes(tmp_path, train=1, val=4, seed=0)
    assert contents(tmp_path) == {"mine": b"kept"}


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        ({"train": -1}, "negative"),
        ({"heldout": [("red", "hexagon")]}, "unknown"),
        ({"heldout": [(color, "circle") for color in COLORS]}, "fewer pairs"),
    ],
)
def test_impossible_requests_are_refused(tmp_path: Path, request_: dict[str, object], match: str) -> None:
    arguments = {"train": 1, "val": 1, "seed": 0} | request_
    with pytest.raises(UserError, match=match):
        build_shapes(tmp_path / "set", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "set").exists()
