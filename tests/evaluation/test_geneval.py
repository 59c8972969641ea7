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
from rmoe_megatron.evaluation.generation import Sampling
from rmoe_megatron.evaluation.geneval.colors import TEXTS, ColorClassifier, crop
from rmoe_megatron.evaluation.geneval.detector import MEAN, STD, Detector, instances
from rmoe_megatron.evaluation.geneval.evaluate import Settings, evaluate_geneval
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
from rmoe_megatron.evaluation.protocol import Protocol
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
    assert relations(near, other, Protocol.fixed) == {"right of"}


def test_counting_has_an_upper_bound_and_nothing_else_has() -> None:
    prompts = make_prompts()
    counting = next(
        each for each in prompts if each["tag"] == "counting" and each["include"][0]["count"] == 3
    )
    name = counting["include"][0]["class"]
    for number, correct in ((2, False), (3, True), (4, False)):
        detected = {name: [box(20.0 * each, 0) for each in range(number)]}
        assert judge(detected, counting, no_color, Protocol.official).correct is correct
    assert judge({name: [box(0, 0)] * 4}, counting, no_color, Protocol.official).reason == (
        f"expected {name}<4, found 4"
    )
    single = next(metadata for metadata in prompts if metadata["prompt"] == "a photo of a bench")
    assert judge({"bench": [box(0, 0)] * 5}, single, no_color, Protocol.official).correct
    assert judge({}, single, no_color, Protocol.official).reason == "expected bench>=1, found 0"


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

    wrong = judge({"car": cars}, metadata, color_of, Protocol.official)  # type: ignore[arg-type]
    assert (wrong.correct, wrong.reason) == (False, "expected red car>=1, found 0; and 1 blue")
    assert judge({"car": cars}, metadata, color_of, Protocol.fixed).correct  # type: ignore[arg-type]
    assert asked == [1, 2]


def test_place_is_asked_of_what_was_found_before() -> None:
    metadata = next(each for each in make_prompts() if each["tag"] == "position")
    target, name = (each["class"] for each in metadata["include"])
    relation = metadata["include"][1]["position"][0]
    offset = {"left of": (-40, 0), "right of": (40, 0), "above": (0, -40), "below": (0, 40)}[relation]
    there, elsewhere = box(50 + offset[0], 50 + offset[1]), box(50 - offset[0], 50 - offset[1])
    official = Protocol.official
    assert judge({target: [box(50, 50)], name: [there]}, metadata, no_color, official).correct
    assert not judge({target: [box(50, 50)], name: [elsewhere, there]}, metadata, no_color, official).correct
    assert judge(
        {target: [box(50, 50)], name: [elsewhere, there]}, metadata, no_color, Protocol.fixed
    ).correct
    assert judge({name: [there]}, metadata, no_color, official).reason.splitlines() == [
        f"expected {target}>=1, found 0",
        f"no target for {name} to be {relation}",
    ]


def test_thresholds_keep_the_most_confident() -> None:
    found = [box(number, 0, score=number / 20) for number in range(21)]
    kept = keep_most_confident(found, 0.3, 16)
    assert [each.score for each in kept] == [number / 20 for number in range(20, 6, -1)]
    assert len(keep_most_confident(found * 2, 0.3, 16)) == 16
    assert keep_most_confident(found, 0.9, 16) == [found[20], found[19]]


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


def test_the_detector_resizes_and_pads_as_mmdet_does(tmp_path: Path) -> None:
    save_detector(tmp_path)
    detector = Detector(tmp_path, torch.device("cpu"))
    for size, expected in (((512, 512), (800, 800)), ((1024, 512), (1333, 667)), ((2000, 500), (1333, 333))):
        height, width = size[1], size[0]
        resized = detector._resize(torch.full((3, height, width), 128.0))
        assert tuple(resized.shape[-2:]) == (expected[1], expected[0])
        assert resized[0].allclose(torch.tensor((128 - MEAN[0]) / STD[0]))


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


def settings(models: Path, out: Path, protocol: Protocol = Protocol.official) -> Settings:
    return Settings(out, 2, protocol, str(models / "detector"), str(models / "clip"))


def score(
    models: Path, out: Path, seed: int = 0, protocol: Protocol = Protocol.official, model: Path | None = None
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
    with pytest.raises(UserError, match="holds an evaluation with seed 0, not 1; choose another --out"):
        score(models, tmp_path / "one", seed=1)
    # A folder of images is scored as it is, under the other rules.
    given = tmp_path / "given"
    score(models, given, protocol=Protocol.fixed, model=tmp_path / "one" / "images")
    results = json.loads((given / "results.json").read_text())
    assert (results["protocol"], results["quirks"], results["images_judged"]) == ("fixed", [], 6)
    assert not (given / "images").exists()
    (tmp_path / "one" / "images" / "00002" / "samples" / "00001.png").unlink()
    with pytest.raises(UserError, match="lacks 1 of 6 images, 00002/samples/00001.png the first"):
        score(models, tmp_path / "holes", model=tmp_path / "one" / "images")
