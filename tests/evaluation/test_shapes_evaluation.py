"""The toy evaluation: detector on ground truth, GenEval's rules on hand-made detections, and the sums."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rmoe_megatron.data.shapes.build import build_shapes
from rmoe_megatron.data.shapes.render import ShapeObject, render
from rmoe_megatron.data.shards.dataset import ShardDataset
from rmoe_megatron.evaluation.shapes import Detection, Verdict, detect, judge
from rmoe_megatron.evaluation.shapes.detector import matches_scene
from rmoe_megatron.evaluation.shapes.evaluate import image_requests, judge_pictures, read_scenes, score
from rmoe_megatron.evaluation.shapes.report import JudgedImage

BLANK = np.full((32, 32, 3), 40, dtype=np.uint8)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "shapes"
    build_shapes(out, train=1, val=480, seed=11)
    return out


@pytest.mark.parametrize("noise", [0, 12])
@pytest.mark.parametrize("split", ["val", "val_heldout"])
def test_detector_is_right_on_ground_truth(shapes: Path, split: str, noise: int) -> None:
    samples = ShardDataset(shapes / split)
    rng = np.random.default_rng(0)
    right = 0
    for index in range(len(samples)):
        sample = samples[index]
        image = sample["png"].transpose(1, 2, 0)
        image = np.clip(image + rng.normal(0, noise, image.shape), 0, 255).astype(np.uint8)
        objects = [(item["shape"], item["color"]) for item in sample["json"]["objects"]]
        right += matches_scene(detect(image), objects)
    assert right / len(samples) >= 0.99


def test_detector_finds_nothing_in_background_and_specks() -> None:
    image = np.full((32, 32, 3), 40, dtype=np.uint8)
    assert detect(image) == []
    image[3:5, 4:6] = 240
    assert detect(image) == []


def test_detector_calls_a_formless_blob_unknown() -> None:
    image = np.full((32, 32, 3), 40, dtype=np.uint8)
    image[4:28, 4:7] = (230, 40, 40)
    assert [item.shape for item in detect(image)] == ["unknown"]


@pytest.mark.parametrize("colors", [("red", "blue"), ("green", "green")])
def test_detector_separates_touching_objects(colors: tuple[str, str]) -> None:
    """The boxes share an edge in the middle of a pixel, so the objects' pixels are connected."""
    objects = [
        ShapeObject("circle", colors[0], 10.0, 16.0, 11.0),
        ShapeObject("diamond", colors[1], 21.0, 16.0, 11.0),
    ]
    image = render(objects)
    assert matches_scene(detect(image), [("circle", colors[0]), ("diamond", colors[1])])


@pytest.mark.parametrize("value", [0, 255])
def test_detector_takes_no_uniform_image_for_an_object(value: int) -> None:
    found = detect(np.full((32, 32, 3), value, dtype=np.uint8))
    assert [item.shape for item in found] == ["unknown"]


def test_detector_names_no_color_outside_the_palette() -> None:
    image = render([ShapeObject("square", "white", 16.0, 16.0, 12.0)])
    image[image.max(axis=-1) > 200] = 0
    assert [item.color for item in detect(image)] == ["unknown"]


def at(shape: str, x: float, y: float, color: str = "red", score: float = 0.9) -> Detection:
    return Detection(shape, color, x, y, 10, 10, score)


CIRCLE, SQUARE = {"class": "circle", "count": 1}, {"class": "square", "count": 1}
RED = {"class": "circle", "count": 1, "color": "red"}
TWO = {"class": "circle", "count": 2}
RIGHT = {"class": "square", "count": 1, "position": ["right of", 0]}


@pytest.mark.parametrize(
    ("include", "exclude", "detections", "correct"),
    [
        ([CIRCLE], [], [at("circle", 8, 8)], True),
        ([CIRCLE], [], [], False),
        ([CIRCLE], [], [at("square", 8, 8)], False),
        ([CIRCLE], [], [at("circle", 8, 8), at("square", 24, 8)], True),
        ([CIRCLE, SQUARE], [], [at("circle", 8, 8), at("square", 24, 8)], True),
        ([CIRCLE, SQUARE], [], [at("circle", 8, 8)], False),
        ([RED], [], [at("circle", 8, 8, "red")], True),
        ([RED], [], [at("circle", 8, 8, "blue")], False),
        # Color is asked of the best-matching object.
        ([RED], [], [at("circle", 8, 8, "blue", 0.9), at("circle", 24, 8, "red", 0.8)], False),
        ([RED], [], [at("circle", 8, 8, "blue", 0.8), at("circle", 24, 8, "red", 0.9)], True),
        ([TWO], [{"class": "circle", "count": 3}], [at("circle", 8, 8), at("circle", 24, 8)], True),
        ([TWO], [{"class": "circle", "count": 3}], [at("circle", 8, 8)], False),
        (
            [TWO],
            [{"class": "circle", "count": 3}],
            [at("circle", x, y) for x, y in ((8, 8), (24, 8), (8, 24))],
            False,
        ),
        ([CIRCLE, RIGHT], [], [at("circle", 8, 16), at("square", 24, 16)], True),
        ([CIRCLE, RIGHT], [], [at("circle", 24, 16), at("square", 8, 16)], False),
        ([CIRCLE, RIGHT], [], [at("circle", 8, 16), at("square", 9, 28)], False),
        # A diagonal of 45 degrees holds both relations: (16 - 2) / hypot(16, 16) = 0.62 along each axis.
        ([CIRCLE, RIGHT], [], [at("circle", 8, 8), at("square", 24, 24)], True),
        # (7 - 2) / hypot(7, 8) = 0.47: the margin comes off the offset, not off the distance it is compared with.
        ([CIRCLE, RIGHT], [], [at("circle", 8, 8), at("square", 15, 16)], False),
        # Boxes that overlap by most of their size have no relation.
        ([CIRCLE, RIGHT], [], [at("circle", 8, 8), at("square", 9.5, 8)], False),
    ],
)
def test_rules(include: list, exclude: list, detections: list[Detection], correct: bool) -> None:
    verdict = judge(detections, {"include": include, "exclude": exclude})
    assert verdict.correct == correct, verdict.reason
    assert bool(verdict.reason) != correct


def judged(shapes: Path, folder: Path, images_per_prompt: int, images: dict[str, np.ndarray]) -> dict:
    """Judge pictures by their captions, or blank ones; returns the scores of every split."""
    scenes = read_scenes(shapes, limit=24)
    requests = image_requests(scenes, images_per_prompt, 0, folder)
    assert len({request.seed for request in requests}) == len(requests)
    for request in requests:
        request.path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.get(request.prompt, BLANK)).save(request.path)
    verdicts = judge_pictures(scenes, requests)
    return {
        split: score([each for each in verdicts if each.split == split], images_per_prompt)
        for split in scenes
    }


def test_ground_truth_scores_one_and_blank_images_zero(shapes: Path, tmp_path: Path) -> None:
    truth = {}
    for split in ("val", "val_heldout"):
        samples = ShardDataset(shapes / split)
        for index in range(len(samples)):
            truth[samples[index]["txt"]] = samples[index]["png"].transpose(1, 2, 0)
    best = judged(shapes, tmp_path / "perfect", 1, truth)
    worst = judged(shapes, tmp_path / "blank", 2, {})
    for split in ("seen", "heldout"):
        assert best[split]["overall"] == 1.0
        assert worst[split]["overall"] == 0.0
        assert worst[split]["images"] == 48


def test_overall_is_the_mean_over_skills_not_over_images() -> None:
    image = np.zeros((1, 1, 3), dtype=np.uint8)
    judged = [JudgedImage("seen", "colors", "x", image, Verdict(True, ""))]
    judged += [JudgedImage("seen", "counting", "x", image, Verdict(False, "no"))] * 3
    assert score(judged)["overall"] == 0.5


def test_a_set_that_holds_out_nothing_is_scored_on_seen_pairs_alone(tmp_path: Path) -> None:
    build_shapes(tmp_path / "shapes", train=1, val=6, seed=3, heldout=())
    found = judged(tmp_path / "shapes", tmp_path / "images", 1, {})
    assert list(found) == ["seen"]
    assert found["seen"]["images"] == 6


def test_the_standard_error_counts_a_prompt_once() -> None:
    """Two images a prompt. Shares by prompt are 1 and 1/2 in one skill, 0 and 1/2 in the other: variances of 1/16, of the means 1/32."""
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    prompts = [("counting", (1, 1)), ("counting", (1, 0)), ("colors", (0, 0)), ("colors", (0, 1))]
    judged = [
        JudgedImage("seen", skill, "", image, Verdict(bool(right), ""))
        for skill, images in prompts
        for right in images
    ]
    found = score(judged, images_per_prompt=2)
    assert found["overall"] == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert found["standard_error"] == pytest.approx((1 / 32 + 1 / 32) ** 0.5 / 2, rel=0.05)
    assert score(judged[:2], images_per_prompt=2)["standard_error"] is None
