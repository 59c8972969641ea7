"""What results.json holds, word by word, of judges whose answers are known: every score is worked out by hand below."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from PIL import Image

from rmoe_megatron.data.shapes.build import build_shapes
from rmoe_megatron.data.shards.dataset import ShardDataset
from rmoe_megatron.evaluation.corebench import evaluate as corebench
from rmoe_megatron.evaluation.corebench import judging
from rmoe_megatron.evaluation.corebench.prompts import Prompt
from rmoe_megatron.evaluation.dpg import evaluate as dpg
from rmoe_megatron.evaluation.dpg.questions import Item, Proposition
from rmoe_megatron.evaluation.dpg.scoring import QUIRKS as DPG_QUIRKS
from rmoe_megatron.evaluation.geneval import evaluate as geneval
from rmoe_megatron.evaluation.geneval.rules import QUIRKS as GENEVAL_QUIRKS
from rmoe_megatron.evaluation.geneval.rules import Detection
from rmoe_megatron.evaluation.geneval2 import evaluate as geneval2
from rmoe_megatron.evaluation.geneval2.soft_tifa import QUIRKS as GENEVAL2_QUIRKS
from rmoe_megatron.evaluation.imagenet import evaluate as imagenet
from rmoe_megatron.evaluation.imagenet.features import Features
from rmoe_megatron.evaluation.shapes import evaluate as shapes
from rmoe_megatron.inference.generation import Sampling
from rmoe_megatron.inference.provenance import png_with

OF_THE_MACHINE = ("sampling", "judge", "model", "prompt_set")  # digests, paths, devices and versions


def picture(path: Path, number: int) -> None:
    """A picture whose first value is its number, and noise besides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    pixels[0, 0, 0] = number
    Image.fromarray(pixels).save(path)


def number_of(image: Image.Image) -> int:
    return int(np.asarray(image.convert("RGB"))[0, 0, 0])


def results(out: Path, of_the_machine: tuple[str, ...] = OF_THE_MACHINE) -> dict[str, Any]:
    text = (out / "results.json").read_text()
    found = json.loads(text, parse_float=lambda digits: round(float(digits), 9))
    assert set(of_the_machine) <= set(found)
    return {name: value for name, value in found.items() if name not in of_the_machine}


class Still:
    def to(self, device: torch.device) -> Self:
        return self


def test_geneval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bench that is there in one of two pictures, and two cats that are one, two, or three."""
    prompts: list[Any] = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {
            "tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}],
            "prompt": "a photo of two cats",
        },
        {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "a photo of two dogs"},
    ]  # fmt: skip
    seen = {
        0: {"bench": 1}, 1: {"cat": 4}, 10: {"cat": 3}, 11: {"cat": 2}, 20: {"dog": 2, "cat": 1}, 21: {"dog": 5},
    }  # fmt: skip

    class Detector(Still):
        def detect(self, image: Image.Image) -> dict[str, list[Detection]]:
            return {
                name: [Detection((0.0, 0.0, 4.0, 4.0), 0.95)] * count
                for name, count in seen[number_of(image)].items()
            }

    for prompt in range(3):
        for image in range(2):
            picture(
                tmp_path / "images" / f"{prompt:05d}" / "samples" / f"{image:05d}.png", 10 * prompt + image
            )
    monkeypatch.setattr(geneval, "judge_record", lambda settings: {})
    monkeypatch.setattr(geneval, "_load_judges", lambda settings: geneval.Judges(Detector(), Still()))  # type: ignore[arg-type]
    settings = geneval.Settings(tmp_path / "out", 2, detector="d", clip="c")
    geneval.evaluate_geneval(
        prompts, Sampling(str(tmp_path / "images"), 1, 7.0, 0, 1), settings, lambda title: None
    )
    assert results(tmp_path / "out") == {
        "benchmark": "GenEval", "protocol": "official", "images_per_prompt": 2, "detector": "d", "clip": "c",
        "quirks": GENEVAL_QUIRKS,
        "differences": [
            "detector d through transformers, in place of mmdet's weights of the same architecture",
            "not the published 553 prompts with 4 images each",
        ],
        "overall": (1 / 2 + 3 / 4) / 2,
        "standard_error": None,  # the task of single objects has one prompt
        "tasks": {"single_object": 1 / 2, "counting": 3 / 4},
        "images_right": round(4 / 6, 9),
        "prompts_right": 1.0,
        "prompts": 3,
        "images_judged": 6,
        "prompt_scores": {
            "single_object": {"00000 a photo of a bench": 0.5},
            "counting": {"00001 a photo of two cats": 0.5, "00002 a photo of two dogs": 1.0},
        },
    }  # fmt: skip
    verdicts = json.loads((tmp_path / "out" / "judged" / "00001.official.json").read_text())
    assert [verdict["reason"] for verdict in verdicts] == ["expected cat<3, found 3", ""]


def without_models(
    monkeypatch: pytest.MonkeyPatch, module: Any, names: dict[str, Callable[..., Any]]
) -> None:
    for name, stand_in in names.items():
        monkeypatch.setattr(module, name, stand_in)


def test_geneval2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[Any] = [
        {
            "prompt": "two cats", "atom_count": 3, "skills": ["object", "count"],
            "vqa_list": [["Are there cats?", "Yes"], ["How many cats are in the image?", "two"]],
        },
        {"prompt": "a dog", "atom_count": 4, "skills": ["object"], "vqa_list": [["Is there a dog?", "Yes"]]},
    ]  # fmt: skip

    class Answerer(Still):
        """Yes with 1/2 for the first picture and 1/4 for the second, and two with 1/8."""

        def first_token(self, image: Image.Image, question: str) -> torch.Tensor:
            probabilities = torch.zeros(128)
            probabilities[ord("Y")] = 0.5 if number_of(image) == 0 else 0.25
            probabilities[ord("t")] = 0.125
            return probabilities

        def first_token_of(self, word: str) -> int:
            return ord(word[0])

        def spell(self, token: int) -> str:
            return chr(token)

    for number in range(2):
        picture(tmp_path / "images" / f"{number:05d}.png", number)
    without_models(monkeypatch, geneval2, {
        "Qwen3VL": lambda name: Answerer(), "model_folder": lambda *named: tmp_path, "model_digest": lambda folder: "",
    })  # fmt: skip
    settings = geneval2.Settings(tmp_path / "out", answerer="q")
    geneval2.evaluate_geneval2(
        prompts, Sampling(str(tmp_path / "images"), 1, 7.0, 0, 1), settings, lambda title: None
    )
    first_am, first_gm, second = (0.5 + 0.125) / 2, 0.25, 0.25
    found = results(tmp_path / "out")
    # Of two prompts each draw of the bootstrap has both, or one of them twice.
    assert found.pop("standard_error") == pytest.approx(100 * abs(first_gm - second) / 8**0.5, abs=0.1)
    assert found.pop("standard_error_am") == pytest.approx(100 * abs(first_am - second) / 8**0.5, rel=0.05)
    assert found == {
        "benchmark": "GenEval 2", "protocol": "official", "answerer": "q", "quirks": GENEVAL2_QUIRKS,
        "differences": ["asked of q, not of Qwen/Qwen3-VL-8B-Instruct", "not the published 800 prompts"],
        "soft_tifa_am": 100 * (first_am + second) / 2,
        "soft_tifa_gm": 100 * (first_gm + second) / 2,
        "skills_am": {"count": 12.5, "object": 37.5},
        "atomicities_gm": {"3": 25.0, "4": 25.0},
        "prompts": 2,
        "atoms": 3,
        "prompt_scores": {"prompts": {"00000 two cats": 25.0, "00001 a dog": 25.0}},
    }  # fmt: skip


def test_dpg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cat that sleeps in one picture and is missing in the other."""
    cat = Item("cat", "a cat asleep", {
        1: Proposition("Is there a cat?", "entity - whole", ()), 2: Proposition("Is the cat asleep?", "attribute - state", (1,)),
    })  # fmt: skip
    dog = Item("dog", "a dog", {1: Proposition("Is there a dog?", "entity - whole", ())})
    said = {(0, "cat?"): "no", (0, "asleep?"): "yes", (1, "dog?"): "yes"}

    class Answerer(Still):
        def answer(self, image: Image.Image, question: str) -> str:
            return said[number_of(image), question.split()[-1]]

    for number, name in enumerate(("cat", "dog")):
        picture(tmp_path / "images" / f"{name}.png", number)
    without_models(monkeypatch, dpg, {
        "load_answerer": lambda name, device: Answerer(), "answerer_record": lambda name: {},
    })  # fmt: skip
    settings = dpg.Settings(tmp_path / "out", 1, answerer="mplug")
    dpg.evaluate_dpg(
        [cat, dog], Sampling(str(tmp_path / "images"), 1, 7.0, 0, 1), settings, lambda title: None
    )
    found = results(tmp_path / "out")
    # The mean of two draws of 0 and 100 is 0, 50 or 100, with a deviation of 100 / 8^(1/2).
    assert found.pop("standard_error") == pytest.approx(100 / 8**0.5, rel=0.05)
    assert found == {
        "benchmark": "DPG-Bench", "protocol": "official", "images_per_prompt": 1, "answerer": "mplug", "quirks": DPG_QUIRKS,
        "differences": ["not the published table of 1065 prompts", "not four images a prompt"],
        "cut": "not at all: 16 x 16 pixels are one image",
        "overall": 50.0,
        # Of answers before dependencies: the cat sleeps that is not there.
        "categories_l1": {"attribute": 100.0, "entity": 50.0},
        "categories_l2": {"attribute - state": 100.0, "entity - whole": 50.0},
        "prompts": 2,
        "prompts_left_out": [],
        "prompt_scores": {"prompts": {"00000 a cat asleep": 0.0, "00001 a dog": 100.0}},
    }  # fmt: skip


def test_corebench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images of three prompts; an answer that is neither is left out, and so is an image that has no other."""
    prompts = [
        Prompt("C-MI-001", "C-MI", "a cat", ("cat?", "mat?", "hat?")),
        Prompt("C-MI-002", "C-MI", "a dog", ("dog?",)),
        Prompt("R-LR-001", "R-LR", "a sum", ("two?", "four?")),
    ]
    said = {
        0: ["yes", "yes", "no"], 1: ["no", "Maybe", "yes"],  # 2/3, 1/2
        10: ["yes"], 11: ["Yes"],  # 1, and nothing that counts
        20: ["no", "no"], 21: ["no", "yes"],  # 0, 1/2
    }  # fmt: skip

    def ask(
        answerer: Any, image: Image.Image, prompt: Prompt, wording: judging.Wording, is_made_here: bool
    ) -> list[str]:
        assert wording.text == "Look."
        assert not is_made_here
        return said[number_of(image)]

    for number, prompt in enumerate(prompts):
        for image in range(2):
            picture(
                tmp_path / "images" / prompt.dimension / f"{prompt.name}-{image}.png", 10 * number + image
            )
    without_models(monkeypatch, corebench, {
        "Qwen3VL": lambda name: Still(), "model_folder": lambda *named: tmp_path, "model_digest": lambda folder: "", "ask": ask,
    })  # fmt: skip
    settings = corebench.Settings(
        tmp_path / "out", 2, answerer="q", wording=judging.Wording("given", "Look.")
    )
    corebench.evaluate_corebench(
        prompts, Sampling(str(tmp_path / "images"), 1, 7.0, 0, 1), settings, lambda title: None
    )
    cat, dog, total = (2 / 3 + 1 / 2) / 2, 1.0, 1 / 4
    multi = (2 / 3 + 1 / 2 + 1) / 3  # of the images that have answers, not of the prompts
    sha256 = "de5176e3"  # sha256sum of the wording
    found = results(tmp_path / "out")
    assert found == {
        "benchmark": "T2I-CoReBench", "protocol": f"official rules for answers, wording given {sha256}, judge q",
        "images_per_prompt": 2, "answerer": "q", "quirks": judging.QUIRKS,
        "differences": [
            f"the judge is asked in the wording given (SHA-256 {sha256}d6e25344), not in the published one",
            "asked of q, not of a published judge (Qwen/Qwen3-VL-30B-A3B-Thinking, Qwen/Qwen3-VL-32B-Thinking, "
            "Qwen/Qwen3-VL-8B-Thinking): not comparable",
            "not the published 1,080 prompts", "not 4 images a prompt",
        ],
        "overall": round(100 * (multi + total) / 2, 9),
        "standard_error": None,  # the second dimension has one prompt
        "composition": round(100 * multi, 9),
        "reasoning": 25.0,
        "dimensions": {"C-MI": round(100 * multi, 9), "R-LR": 25.0},
        "prompts": 3,
        "images_judged": 6,
        "questions": 12,
        "neither_yes_nor_no": 2,
        "prompt_scores": {
            "C-MI": {"00000 a cat": round(100 * cat, 9), "00001 a dog": 100 * dog}, "R-LR": {"00002 a sum": 25.0},
        },
    }  # fmt: skip


def test_imagenet(tmp_path: Path) -> None:
    """Numbers in the place of features: four of either set lie at 0 to 3, four of the samples at -100 and four of the reference at 100.

    With three neighbours the manifold of four numbers in a row ends within three of them, so that half of the samples lie in that of the
    reference, and half of the reference in that of the samples.
    """
    samples, real = [0, 1, 2, 3, -103, -102, -101, -100], [0, 1, 2, 3, 100, 101, 102, 103]
    corners = {**dict.fromkeys(range(8), 1), **dict.fromkeys(range(10, 18), 5)}
    corners |= {number: corners[number] + 2 for number in (4, 5, 6, 7, 14, 15, 16, 17)}

    def extract(images: Any) -> Features:
        numbers = [int(image[0, 0, 0]) for image in images]
        pool = [[samples[number] if number < 10 else real[number - 10]] for number in numbers]
        certain = [[1.0, 0.0] if number % 2 else [0.0, 1.0] for number in numbers]
        spatial = [[corners[number]] for number in numbers]
        return Features(*(np.array(each, dtype=np.float32) for each in (pool, spatial, certain)))

    for number in (*range(8), *range(10, 18)):
        picture(tmp_path / ("samples" if number < 10 else "real") / f"{number}.png", number)
    pixels = [np.asarray(Image.open(tmp_path / "real" / f"{number}.png")) for number in range(10, 18)]
    np.savez(tmp_path / "reference.npz", arr_0=np.stack(pixels))
    settings = imagenet.Settings(tmp_path / "out", tmp_path / "reference.npz", tmp_path / "inception.pth")
    sampling = Sampling(str(tmp_path / "samples"), 1, 1.5, 0, 3)
    imagenet.evaluate_imagenet(sampling, settings, lambda title: None, extract=extract)
    found = results(tmp_path / "out", ("sampling", "judge", "model", "reference", "class_labels"))
    # The means are -50 and 51.5; deviations are 50 to 53 and 48.5 to 51.5, each four times over seven degrees of freedom.
    deviations = [
        (sum(2 * each**2 for each in far) / 7) ** 0.5 for far in ((50, 51, 52, 53), (48.5, 49.5, 50.5, 51.5))
    ]
    fid = 101.5**2 + (deviations[0] - deviations[1]) ** 2
    assert found.pop("fid") == pytest.approx(fid, rel=1e-6)
    assert found.pop("sfid") == pytest.approx(16, rel=1e-6)  # means of 2 and 6, the same scatter
    assert found.pop("inception_score") == pytest.approx(2, rel=1e-6)  # two classes, certain, as often
    assert found == {
        "benchmark": "ImageNet 256", "protocol": "official", "classes": "given", "quirks": imagenet.QUIRKS,
        "extractor": "torch-fidelity's Inception v3 with TensorFlow's weights of 2015-12-05",
        "differences": [
            "8 images: not FID-50K", "features of inception.pth, not of torch-fidelity's published weights",
        ],
        "precision": 0.5, "recall": 0.5, "images": 8, "reference_images": 8,
    }  # fmt: skip


def test_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pictures for each of twelve prompts, two of every skill, and of three held-out ones; a picture is the scene or empty."""
    build_shapes(tmp_path / "shapes", train=1, val=12, seed=5)
    right = {"val": [2, 1, 0, 2, 1, 0, 0, 1, 0, 2, 2, 2], "val_heldout": [2, 0, 1]}  # of the two pictures
    scenes = {
        split: [ShardDataset(tmp_path / "shapes" / split)[number] for number in range(len(counts))]
        for split, counts in right.items()
    }
    drawn = []
    for split, counts in right.items():
        for scene, count in zip(scenes[split], counts, strict=True):
            whole = scene["png"].transpose(1, 2, 0)
            drawn += [whole] * count + [np.full_like(whole, 40)] * (2 - count)

    def generate(parts: Any, claims: Path, progress: None) -> None:
        pictures = [picture for _, some in parts for picture in some]
        assert len({picture.request.seed for picture in pictures}) == len(pictures)
        for each, image in zip(pictures, drawn, strict=True):
            each.product.write(png_with(Image.fromarray(image), each.product.record))

    monkeypatch.setattr(shapes, "generate", generate)
    monkeypatch.setattr(shapes, "sampling_record", lambda sampling: {})
    settings = shapes.Settings(tmp_path / "shapes", tmp_path / "out", images_per_prompt=2)
    shapes.evaluate_shapes(Sampling("m", 1, 1.0, 7, 4), settings)
    captions = {split: [scene["json"]["caption"] for scene in each] for split, each in scenes.items()}
    names = {split: [f"{n:05d} {each}" for n, each in enumerate(captions[split])] for split in captions}
    skills = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
    seen = dict(zip(names["val"], [1, 0.5, 0, 1, 0.5, 0, 0, 0.5, 0, 1, 1, 1], strict=True))
    heldout = [scene["json"]["skill"] for scene in scenes["val_heldout"]]
    assert len(set(heldout)) == 3
    found = results(tmp_path / "out")
    # Variances of 1/2, 1/8 and 1/2 over two prompts each, in three of six skills; a bootstrap of two takes half of them.
    error = found["splits"]["seen"].pop("standard_error")
    assert error == pytest.approx((0.125 + 0.03125 + 0.125) ** 0.5 / 6, rel=0.05)
    assert found == {
        "benchmark": "toy shapes", "images_per_prompt": 2, "seed": 7, "detector_accuracy_on_ground_truth": 1.0,
        "splits": {
            "seen": {
                "overall": round(3.25 / 6, 9),
                "skills": dict(zip(skills, [0.5, 0.5, 0.0, 1.0, 0.75, 0.5], strict=True)),
                "images": 24,
                "prompt_scores": {
                    skill: {name: seen[name] for name in names["val"][place::6]} for place, skill in enumerate(skills)
                },
            },
            "heldout": {
                "overall": 0.5,
                "standard_error": None,
                "skills": dict(zip(heldout, [1.0, 0.0, 0.5], strict=True)),
                "images": 6,
                "prompt_scores": {
                    skill: {name: share}
                    for skill, name, share in zip(heldout, names["val_heldout"], [1.0, 0.0, 0.5], strict=True)
                },
            },
        },
    }  # fmt: skip
