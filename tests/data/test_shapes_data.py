"""The toy shapes set: drawing against closed-form areas, captions against scenes, held-out pairs, determinism."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import webdataset

from rmoe_megatron.data.shapes.build import build_shapes
from rmoe_megatron.data.shapes.render import coverage
from rmoe_megatron.data.shapes.vocabulary import COLORS, HELDOUT_PAIRS, PLURALS, SHAPES
from rmoe_megatron.errors import UserError


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "shapes"
    build_shapes(out, train=600, val=240, seed=3)
    return out


def read(folder: Path) -> list[dict]:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))


@pytest.mark.parametrize(
    ("shape", "share"),
    [("circle", math.pi / 4), ("square", 1.0), ("triangle", 0.5), ("diamond", 0.5), ("cross", 5 / 9)],
)
def test_areas(shape: str, share: float) -> None:
    area = float(coverage(shape, 15.3, 16.8, 20.0).sum())
    assert area == pytest.approx(share * 400, rel=0.02)


def test_webdataset_reads_the_shards(shapes: Path) -> None:
    description = json.loads((shapes / "dataset.json").read_text())
    for split, entry in description["splits"].items():
        samples = read(shapes / split)
        assert len(samples) == entry["samples"]
        assert all(sample["png"].shape == (32, 32, 3) for sample in samples)
    assert description["toy"] is True


def test_captions_agree_with_scenes(shapes: Path) -> None:
    """The caption, parsed anew with regular expressions, describes the objects."""
    singular = {plural: name for name, plural in PLURALS.items()}
    numbers = {"a": 1, "one": 1, "two": 2, "three": 3, "four": 4}
    pattern = re.compile(rf"(?:({'|'.join(numbers)}) )(?:({'|'.join(COLORS)}) )?(\w+)")
    for sample in read(shapes / "train") + read(shapes / "val_heldout"):
        scene = sample["json"]
        text = re.sub(r"^(a photo of|an image of|a picture of) ", "", sample["txt"])
        named = [(numbers[n], c, singular.get(s, s)) for n, c, s in pattern.findall(text)]
        assert {shape for _, _, shape in named} == {item["shape"] for item in scene["objects"]}, text
        for count, color, shape in named:
            objects = [item for item in scene["objects"] if item["shape"] == shape]
            assert len(objects) == count, text
            assert not color or all(item["color"] == color for item in objects), text
        relation = re.search(r"left of|right of|above|below", text)
        if relation:
            first, second = (
                next(o for o in scene["objects"] if o["shape"] == shape) for _, _, shape in named
            )
            dx, dy = first["x"] - second["x"], first["y"] - second["y"]
            expected = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation.group()]
            assert expected == max(abs(dx), abs(dy)), text


def test_heldout_pairs_are_never_trained_on(shapes: Path) -> None:
    def pairs(split: str) -> list[set[tuple[str, str]]]:
        return [{(o["color"], o["shape"]) for o in s["json"]["objects"]} for s in read(shapes / split)]

    heldout = set(HELDOUT_PAIRS)
    assert not any(found & heldout for found in pairs("train") + pairs("val"))
    assert all(found & heldout for found in pairs("val_heldout"))
    assert set.union(*pairs("train")) == {(c, s) for c in COLORS for s in SHAPES} - heldout


def test_objects_keep_apart_and_inside(shapes: Path) -> None:
    for sample in read(shapes / "train"):
        objects = sample["json"]["objects"]
        for item in objects:
            for center in (item["x"], item["y"]):
                assert center - item["size"] / 2 >= 0.5
                assert center + item["size"] / 2 <= 31.5
        for i, one in enumerate(objects):
            for other in objects[:i]:
                gap = max(abs(one["x"] - other["x"]), abs(one["y"] - other["y"]))
                assert gap >= (one["size"] + other["size"]) / 2 + 1 - 0.002  # stored to three decimals


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_shapes(tmp_path / name, train=20, val=12, seed=seed)
    first, second, third = ((tmp_path / name / "train/shapes-000000.tar").read_bytes() for name in "abc")
    assert first == second != third


def test_a_used_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(UserError, match="not an empty folder"):
        build_shapes(tmp_path, train=1, val=1, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "request_", [{"train": 0}, {"train": -1}, {"val": -1}, {"seed": -1}, {"seed": 1 << 63}]
)
def test_impossible_requests_are_refused(tmp_path: Path, request_: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"{'='.join(map(str, *request_.items()))}.* not possible"):
        build_shapes(tmp_path / "out", **{"train": 1, "val": 1, "seed": 0, **request_})
    assert not list(tmp_path.iterdir())


def test_skills_are_equally_frequent_in_validation(shapes: Path) -> None:
    skills = [sample["json"]["skill"] for sample in read(shapes / "val")]
    counts = np.unique(skills, return_counts=True)[1]
    assert len(counts) == 6
    assert counts.min() == counts.max() == 40
