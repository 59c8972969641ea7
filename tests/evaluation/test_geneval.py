"""GenEval: the published prompts, its rules on hand-made cases, its judges against transformers, and the whole of it."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.geneval.colors import TEXTS, ColorClassifier, central_square, crop
from rmoe_megatron.evaluation.geneval.detector import MEAN, STD, Detector, instances
from rmoe_megatron.evaluation.geneval.evaluate import Settings, evaluate_geneval
from rmoe_megatron.evaluation.geneval.opencv_resize import resize
from rmoe_megatron.evaluation.geneval.prompts import (
    CLASSES,
    COLORS,
    is_official,
    make_prompts,
    read_metadata,
)
from rmoe_megatron.evaluation.geneval.rules import (
    Detection,
    judge,
    keep_most_confident,
    relations,
)
from rmoe_megatron.evaluation.rule_set import RuleSet
from rmoe_megatron.inference.generation import Sampling
from tests.support.judges import save_clip, save_detector
from tests.support.local_slurm import ROOT
from tests.support.sd3_pipeline import save_pipeline


def test_the_recipe_makes_the_published_prompts() -> None:
    prompts = make_prompts()
    lines = "".join(json.dumps(metadata) + "\n" for metadata in prompts)
    # Of prompts/evaluation_metadata.jsonl in github.com/djghosh13/geneval.
    published = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
    assert hashlib.sha256(lines.encode()).hexdigest() == published
    assert len(prompts) == 553
    assert is_official(prompts)
    assert not is_official(prompts[:-1])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            '{"tag": "counting", "prompt": "x", "include": [{"class": "unicorn", "count": 1}]}',
            "the class 'unicorn'",
        ),
        ('{"tag": "poetry", "prompt": "x", "include": [{"class": "cat", "count": 1}]}', "tag"),
        (
            '{"tag": "colors", "prompt": "x", "include": [{"class": "cat", "count": 1, "color": "teal"}]}',
            "color",
        ),
        (
            '{"tag": "position", "prompt": "x", "include": [{"class": "cat", "count": 1, "position": ["above", 0]}]}',
            "position that is none",
        ),
        (
            '{"tag": "position", "prompt": "x", "include": [{"class": "cat", "count": 1, "position": ["in", 0]}]}',
            "position that is none",
        ),
        (
            '{"tag": "position", "prompt": "x", "include": [{"class": "cat", "count": 1}, '
            '{"class": "dog", "count": 1, "position": ["above", 1]}]}',
            "position that is none",
        ),
        ("", "holds no prompt"),
    ],
)
def test_metadata_of_others(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=words):
        read_metadata(tmp_path / "metadata.jsonl")


def box(left: float, top: float, size: float = 10.0, score: float = 0.9) -> Detection:
    return Detection((left, top, left + size, top + size), score)


def no_color(objects: list[Detection], name: str) -> list[str]:
    raise AssertionError("no colour is asked for")


# Boxes of 10 pixels: an offset is shrunk by 2 along each axis, and divided by its length before that.
RELATIONS = [
    ((20, 0), {"right of"}),
    ((-20, 0), {"left of"}),
    ((0, 20), {"below"}),
    ((0, -20), {"above"}),
    ((20, 20), {"right of", "below"}),  # 18 / 28.3 = 0.64 along both
    ((20, 12), {"right of"}),  # 18 / 23.3 and 10 / 23.3 = 0.43
    ((4, 0), set()),  # 2 / 4 is not more than a half
    ((4.2, 0), {"right of"}),
    ((2, 2), set()),
    ((0, 0), set()),
]


@pytest.mark.parametrize(("offset", "expected"), RELATIONS)
def test_relations(offset: tuple[float, float], expected: set[str]) -> None:
    assert relations(box(50 + offset[0], 50 + offset[1]).box, box(50, 50).box) == expected


def test_the_repaired_relation_divides_what_it_has_shrunk() -> None:
    near, other = box(53.5, 50).box, box(50, 50).box
    assert relations(near, other) == set()  # 1.5 / 3.5
    assert relations(near, other, RuleSet.fixed) == {"right of"}


def test_counting_has_an_upper_bound_and_nothing_else_has() -> None:
    prompts = make_prompts()
    counting = next(
        each for each in prompts if each["tag"] == "counting" and each["include"][0]["count"] == 3
    )
    name = counting["include"][0]["class"]
    for number, correct in ((2, False), (3, True), (4, False)):
        detected = {name: [box(20.0 * each, 0) for each in range(number)]}
        assert judge(detected, counting, no_color, RuleSet.official).correct is correct
    assert judge({name: [box(0, 0)] * 4}, counting, no_color, RuleSet.official).reason == (
        f"expected {name}<4, found 4"
    )
    single = next(metadata for metadata in prompts if metadata["prompt"] == "a photo of a bench")
    assert judge({"bench": [box(0, 0)] * 5}, single, no_color, RuleSet.official).correct
    assert judge({}, single, no_color, RuleSet.official).reason == "expected bench>=1, found 0"


def test_colour_is_asked_of_the_most_confident() -> None:
    metadata = {
        "tag": "colors", "prompt": "a photo of a red car", "include": [{"class": "car", "count": 1, "color": "red"}],
    }  # fmt: skip
    cars = [box(0, 0, score=0.9), box(50, 0, score=0.8)]
    colors = {id(cars[0]): "blue", id(cars[1]): "red"}
    asked: list[int] = []

    def color_of(objects: list[Detection], name: str) -> list[str]:
        assert name == "car"
        asked.append(len(objects))
        return [colors[id(each)] for each in objects]

    wrong = judge({"car": cars}, metadata, color_of, RuleSet.official)  # type: ignore[arg-type]
    assert (wrong.correct, wrong.reason) == (False, "expected red car>=1, found 0 red; and 1 blue")
    assert judge({"car": cars}, metadata, color_of, RuleSet.fixed).correct  # type: ignore[arg-type]
    assert asked == [1, 2]


def test_place_is_asked_of_what_was_found_before() -> None:
    metadata = next(each for each in make_prompts() if each["tag"] == "position")
    target, name = (each["class"] for each in metadata["include"])
    relation = metadata["include"][1]["position"][0]
    offset = {"left of": (-40, 0), "right of": (40, 0), "above": (0, -40), "below": (0, 40)}[relation]
    there, elsewhere = box(50 + offset[0], 50 + offset[1]), box(50 - offset[0], 50 - offset[1])
    official = RuleSet.official
    assert judge({target: [box(50, 50)], name: [there]}, metadata, no_color, official).correct
    assert not judge({target: [box(50, 50)], name: [elsewhere, there]}, metadata, no_color, official).correct
    assert judge({target: [box(50, 50)], name: [elsewhere, there]}, metadata, no_color, RuleSet.fixed).correct
    assert judge({name: [there]}, metadata, no_color, official).reason.splitlines() == [
        f"expected {target}>=1, found 0",
        f"no target for {name} to be {relation}",
    ]


def test_the_colours_of_several_are_counted_in_the_order_of_the_list() -> None:
    requirement = {"class": "car", "count": 3, "color": "black"}
    metadata = {"tag": "colors", "prompt": "three black cars", "include": [requirement]}
    seen = ["white", "black", "white"]
    found = judge({"car": [box(0, 0)] * 3}, metadata, lambda objects, name: seen, RuleSet.official)  # type: ignore[arg-type]
    assert found.reason == "expected black car>=3, found 1 black; and 1 black, 2 white"


def test_the_first_pair_that_is_not_in_place_is_named() -> None:
    """Two dogs that should be left of two cats: the first is, but the second is below and right of the first cat."""
    metadata = {
        "tag": "position", "prompt": "two dogs left of two cats",
        "include": [{"class": "cat", "count": 2}, {"class": "dog", "count": 2, "position": ["left of", 0]}],
    }  # fmt: skip
    cats, dogs = [box(50, 50), box(90, 50)], [box(10, 50), box(80, 80)]
    found = judge({"cat": cats, "dog": dogs}, metadata, no_color, RuleSet.official)  # type: ignore[arg-type]
    assert found.reason == "expected dog left of target, found right of and below target"
    swapped = judge({"cat": cats, "dog": dogs[::-1]}, metadata, no_color, RuleSet.official)  # type: ignore[arg-type]
    assert swapped.reason == found.reason


def test_the_repaired_position_has_any_target() -> None:
    """The most confident cat has no dog at its left, the other one has; official looks at the first alone."""
    metadata = {
        "tag": "position", "prompt": "a dog left of a cat",
        "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
    }  # fmt: skip
    detected = {"cat": [box(0, 50, score=0.9), box(90, 50, score=0.8)], "dog": [box(50, 50)]}
    assert not judge(detected, metadata, no_color, RuleSet.official).correct  # type: ignore[arg-type]
    assert judge(detected, metadata, no_color, RuleSet.fixed).correct  # type: ignore[arg-type]


def test_thresholds_keep_the_most_confident() -> None:
    found = [box(number, 0, score=number / 20) for number in range(21)]
    kept = keep_most_confident(found, 0.3, 16)
    assert [each.score for each in kept] == [number / 20 for number in range(20, 6, -1)]
    assert len(keep_most_confident(found * 2, 0.3, 16)) == 16
    assert keep_most_confident(found, 0.9, 16) == [found[20], found[19]]


@pytest.mark.parametrize("threshold", [0.3, 0.9])
def test_a_score_that_is_the_threshold_in_float32_is_dropped(threshold: float) -> None:
    """The detector's scores are float32, and as a double float32(0.3) is more than 0.3."""
    nearest = np.float32(threshold)
    scores = [np.nextafter(nearest, np.float32(1)), nearest, np.nextafter(nearest, np.float32(0))]
    found = [box(0, 0, score=float(score)) for score in scores]
    assert keep_most_confident(found, threshold, 16) == [found[0]]


def test_instances_in_closed_form() -> None:
    """Two queries: a cat with certainty on the left half, a dog of probability 1/2 on one pixel."""
    logits = torch.full((2, 81), -1e9)
    logits[0, CLASSES.index("cat")] = 0
    logits[1, [CLASSES.index("dog"), 80]] = 0
    masks = torch.full((2, 6, 8), -4.0)
    masks[0, :, :4] = 2.0
    masks[1, 3, 5] = 1.0
    found = instances(logits, masks)
    cat, dog = found["cat"][0], found["dog"][0]
    assert cat.box == (0.0, 0.0, 4.0, 6.0)
    assert dog.box == (5.0, 3.0, 6.0, 4.0)
    assert cat.score == pytest.approx(1 / (1 + np.exp(-2)))
    assert dog.score == pytest.approx(0.5 / (1 + np.exp(-1)))
    assert cat.mask is not None
    assert cat.mask.sum() == 24
    # Pairs of probability zero fill up the hundred; no threshold keeps them.
    assert sum(len(each) for each in found.values()) == 100
    assert sum(each.score > 0.3 for group in found.values() for each in group) == 2


def test_the_detector_does_what_the_network_says(tmp_path: Path) -> None:
    model = save_detector(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    detector = Detector(tmp_path, torch.device("cpu"), short_side=64)  # neither resized nor padded
    found = detector.detect(Image.fromarray(pixels))
    normalised = (torch.tensor(pixels.astype(np.float32)) - torch.tensor(MEAN)) / torch.tensor(STD)
    with torch.no_grad():
        output = model(pixel_values=normalised.permute(2, 0, 1)[None])
    probabilities = output.class_queries_logits[0].softmax(-1)
    masks = torch.nn.functional.interpolate(output.masks_queries_logits, size=(64, 96), mode="bilinear")[0]
    query, label = divmod(int(probabilities[:, :80].argmax()), 80)
    inside = masks[query] > 0
    score = (
        float(probabilities[query, label] * masks[query].sigmoid()[inside].mean()) if inside.any() else 0.0
    )
    best = [
        each
        for each in found[CLASSES[label]]
        if each.mask is not None and (each.mask == inside.numpy()).all()
    ]
    assert any(each.score == pytest.approx(score, rel=1e-4) for each in best)


@pytest.mark.parametrize(
    ("size", "resized", "padded"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((1024, 512), (1333, 667), (1344, 672)),
        ((2000, 500), (1333, 333), (1344, 352)),
    ],
)
def test_the_detector_resizes_and_pads_as_mmdet_does(
    tmp_path: Path, size: tuple[int, int], resized: tuple[int, int], padded: tuple[int, int]
) -> None:
    save_detector(tmp_path)
    width, height = size
    pixels = np.full((height, width, 3), 77, dtype=np.uint8)
    found, inner = Detector(tmp_path, torch.device("cpu")).prepare(pixels)
    assert inner == resized[::-1]
    assert found.shape[1:] == padded[::-1]
    for channel in range(3):
        inside, outside = ((value - MEAN[channel]) / STD[channel] for value in (77, 128))
        assert found[channel, : inner[0], : inner[1]].allclose(torch.tensor(inside))
        # Grey of 128 is normalised like a picture.
        assert found[channel, inner[0] :].allclose(torch.tensor(outside))
        assert found[channel, :, inner[1] :].allclose(torch.tensor(outside))


# Of a noisy picture at other sizes, [height, width]: what cv2.resize gives, of OpenCV 4.10 and of 5.0.
OPENCVS = {
    (61, 94): "052ab0a52470b8a0", (122, 94): "3c2befbc83dcdec9", (20, 31): "21d654ad37d91040", (800, 616): "df57f9a833f0a81b",
    (30, 23): "3d21e7233627f03c",
}  # fmt: skip


def test_pictures_are_resized_as_opencv_does_it() -> None:
    """A row of 4 pixels to 6: weights of 5/6, 1/6 and 1/2 in whole numbers of 1/2048, by hand."""
    row = np.array([0, 255, 10, 200], dtype=np.uint8).reshape(1, 4, 1)
    # Places -1/6, 1/2, 7/6, 11/6, 5/2 and 19/6 of which the first and the last lie beyond the edge.
    by_hand = [
        0, (0 * 1024 + 255 * 1024) / 2048, (255 * 1707 + 10 * 341) / 2048, (255 * 341 + 10 * 1707) / 2048,
        (10 * 1024 + 200 * 1024) / 2048, 200,
    ]  # fmt: skip
    found = resize(row, 1, 6)[0, :, 0]
    assert np.abs(found - np.array(by_hand)).max() <= 0.51
    noise = np.random.default_rng(5).integers(0, 256, (61, 47, 3), dtype=np.uint8)
    for size, digest in OPENCVS.items():
        assert hashlib.sha256(resize(noise, *size).tobytes()).hexdigest()[:16] == digest, size


def test_the_input_of_the_detector_is_opencvs(tmp_path: Path) -> None:
    """The digest of a picture that OpenCV resized to 64 x 83 pixels, padded to 64 x 96 and normalised, step by step as mmdet."""
    save_detector(tmp_path)
    noise = np.random.default_rng(5).integers(0, 256, (61, 47, 3), dtype=np.uint8)
    found, _ = Detector(tmp_path, torch.device("cpu"), short_side=64).prepare(noise)
    assert (
        hashlib.sha256(found.numpy(force=True).copy(order="C").tobytes()).hexdigest()[:16]
        == "3d7c92c30152bf7c"
    )


@pytest.mark.parametrize(
    ("size", "resized", "corner"),
    [
        ((5, 14), (224, 627), (0, 202)),  # 627.2 and 201.5
        ((14, 5), (627, 224), (202, 0)),
        ((10, 29), (224, 649), (0, 212)),  # 649.6 and 212.5, of which the even number is taken
        ((30, 30), (224, 224), (0, 0)),
        ((300, 700), (224, 522), (0, 149)),  # 522.67
    ],
)
def test_crops_are_cut_as_torchvision_does_it(
    size: tuple[int, int], resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    whole = np.asarray(image.resize(resized, Image.Resampling.BICUBIC))
    left, top = corner
    assert (np.asarray(central_square(image, 224)) == whole[top : top + 224, left : left + 224]).all()


def test_colours_are_transformers_clip(tmp_path: Path) -> None:
    model = save_clip(tmp_path)
    classifier = ColorClassifier(tmp_path, torch.device("cpu"))
    pixels = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    mask = np.zeros((40, 60), dtype=bool)
    mask[5:30, 10:50] = True
    found = [Detection((10.0, 5.0, 50.0, 30.0), 0.9, mask), Detection((0.4, 0.0, 39.6, 40.0), 0.8)]
    grey = crop(image, Detection((0, 0, 60, 40), 1.0, mask))
    assert np.asarray(grey)[0, 0].tolist() == [0x99] * 3
    assert (np.asarray(grey)[mask] == pixels[mask]).all()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    expected = []
    for each in found:
        inputs = processor(crop(image, each), return_tensors="pt")
        with torch.no_grad():
            seen = model.visual_projection(model.vision_model(**inputs).pooler_output)[0]
            scores = []
            for color in COLORS:
                texts = [text.format(color=color, name="car") for text in TEXTS]
                tokens = classifier.tokenizer(texts, padding=True, return_tensors="pt")
                said = model.text_projection(model.text_model(**tokens).pooler_output)
                mean = (said / said.norm(dim=-1, keepdim=True)).mean(dim=0)
                scores.append(float(seen @ mean / mean.norm()))
        expected.append(COLORS[int(np.argmax(scores))])
    assert classifier.classify(image, found, "car") == expected


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_pipeline(folder / "model")
    save_detector(folder / "detector")
    save_clip(folder / "clip")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in make_prompts()[::200]))
    return folder


def settings(models: Path, out: Path, protocol: RuleSet = RuleSet.official) -> Settings:
    return Settings(out, 2, protocol, str(models / "detector"), str(models / "clip"))


def score(
    models: Path, out: Path, seed: int = 0, protocol: RuleSet = RuleSet.official, model: Path | None = None
) -> None:
    """Score in this process, as one rank does."""
    sampling = Sampling(str(model or models / "model"), 1, 7.0, seed, 3)
    prompts = read_metadata(models / "prompts.jsonl")
    evaluate_geneval(prompts, sampling, settings(models, out, protocol), lambda title: None)


def images(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_the_whole_with_two_ranks_again_and_from_a_folder(models: Path, tmp_path: Path) -> None:
    command = [
        "eval", "geneval", str(models / "model"), "--out", str(tmp_path / "two"), "--metadata", str(models / "prompts.jsonl"),
        "--detector", str(models / "detector"), "--clip", str(models / "clip"), "--steps", "1", "--images-per-prompt", "2",
        "--batch-size", "3", "--dtype", "fp32",
    ]  # fmt: skip
    # Ranks of a job, started by hand: they share nothing but the folder.
    shared = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "PYTHONPATH": str(ROOT),
    }
    ranks = [
        subprocess.Popen([sys.executable, "-m", "rmoe_megatron", *command], env={**shared, "RANK": str(rank)})
        for rank in (0, 1)
    ]
    score(models, tmp_path / "one")
    assert [process.wait(timeout=240) for process in ranks] == [0, 0]
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert results["images_judged"] == 6
    assert results["overall"] == pytest.approx(np.mean(list(results["tasks"].values())))
    assert "not the published 553 prompts with 4 images each" in results["differences"]
    assert (tmp_path / "one" / "gallery.png").is_file()
    made = images(tmp_path / "one" / "images")
    assert len(made) == 6
    assert len(set(made.values())) == 6
    assert images(tmp_path / "two" / "images") == made
    again = json.loads((tmp_path / "two" / "results.json").read_text())
    assert (again["overall"], again["tasks"]) == (results["overall"], results["tasks"])
    # What was lost is made again, and nothing else.
    lost, kept = sorted((tmp_path / "one" / "images").rglob("*.png"))[2:4]
    before = kept.stat().st_mtime_ns
    lost.unlink()
    score(models, tmp_path / "one")
    assert images(tmp_path / "one" / "images") == made
    assert kept.stat().st_mtime_ns == before
    with pytest.raises(
        UserError, match=r"holds another evaluation \(sampling seed 0 instead of 1\); choose another --out"
    ):
        score(models, tmp_path / "one", seed=1)
    # A folder of images is scored as it is, under the other rules.
    given = tmp_path / "given"
    score(models, given, protocol=RuleSet.fixed, model=tmp_path / "one" / "images")
    results = json.loads((given / "results.json").read_text())
    assert (results["protocol"], results["quirks"], results["images_judged"]) == ("fixed", [], 6)
    assert not (given / "images").exists()
    (tmp_path / "one" / "images" / "00002" / "samples" / "00001.png").unlink()
    with pytest.raises(UserError, match="lacks 1 of 6 images, 00002/samples/00001.png the first"):
        score(models, tmp_path / "holes", model=tmp_path / "one" / "images")
