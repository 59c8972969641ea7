"""What results.json holds, word by word, of judges whose answers are known: every score is worked out by hand below."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from PIL import Image

from rmoe_megatron.evaluation.dpg import evaluate as dpg
from rmoe_megatron.evaluation.dpg.questions import Item, Proposition
from rmoe_megatron.evaluation.dpg.scoring import QUIRKS as DPG_QUIRKS
from rmoe_megatron.evaluation.generation import Sampling
from rmoe_megatron.evaluation.geneval import evaluate as geneval
from rmoe_megatron.evaluation.geneval.rules import QUIRKS as GENEVAL_QUIRKS
from rmoe_megatron.evaluation.geneval.rules import Detection
from rmoe_megatron.evaluation.geneval2 import evaluate as geneval2
from rmoe_megatron.evaluation.geneval2.soft_tifa import QUIRKS as GENEVAL2_QUIRKS

OF_THE_MACHINE = ("sampling", "judge", "model", "prompt_set")  # digests, paths, devices and versions


def picture(path: Path, number: int) -> None:
    """A picture whose first value is its number, and noise besides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    pixels[0, 0, 0] = number
    Image.fromarray(pixels).save(path)


def number_of(image: Image.Image) -> int:
    return int(np.asarray(image.convert("RGB"))[0, 0, 0])


def results(out: Path) -> dict[str, Any]:
    text = (out / "results.json").read_text()
    found = json.loads(text, parse_float=lambda digits: round(float(digits), 9))
    assert set(OF_THE_MACHINE) <= set(found)
    return {name: value for name, value in found.items() if name not in OF_THE_MACHINE}


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
