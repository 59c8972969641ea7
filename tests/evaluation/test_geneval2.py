"""GenEval 2: what counts as an answer, the sums, the model that answers against transformers, and the whole of it."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.geneval2.evaluate import Settings, evaluate_geneval2, means
from rmoe_megatron.evaluation.geneval2.prompts import Prompt, read_prompts
from rmoe_megatron.evaluation.geneval2.soft_tifa import (
    geometric_mean,
    score_atom,
    summarise,
    ways_to_write,
)
from rmoe_megatron.evaluation.question_answering import Qwen3VL
from rmoe_megatron.evaluation.qwen_pixels import QwenPixels
from rmoe_megatron.evaluation.rule_set import RuleSet
from rmoe_megatron.inference.generation import ImageRequest, Picture, Sampling
from tests.support.commands import rmoe
from tests.support.judges import save_answerer
from tests.support.sd3_pipeline import save_pipeline

# Of the published README.
COWS: Prompt = {
    "prompt": "four white bicycles in front of three plastic cows",
    "atom_count": 7,
    "vqa_list": [
        ["How many bicycles are in the image?", "four"], ["Are the bicycles white?", "Yes"],
        ["Are there any bicycles in the image?", "Yes"], ["Are the bicycles in front of the cows?", "Yes"],
        ["How many cows are in the image?", "three"], ["Are the cows plastic?", "Yes"],
        ["Are there any cows in the image?", "Yes"],
    ],
    "skills": ["count", "attribute", "object", "position", "count", "attribute", "object"],
}  # fmt: skip
CAT: Prompt = {
    "prompt": "a cat", "atom_count": 3, "vqa_list": [["Is there a cat?", "Yes"]], "skills": ["object"],
}  # fmt: skip


class Letters:
    """Answers with a probability for every first character; a word's first token is its first character."""

    def __init__(self, probabilities: dict[str, float]) -> None:
        self.probabilities = torch.zeros(128)
        for letter, probability in probabilities.items():
            self.probabilities[ord(letter)] = probability
        self.asked: list[str] = []

    def first_token(self, image: Image.Image, question: str) -> Tensor:
        self.asked.append(question)
        return self.probabilities

    def first_token_of(self, word: str) -> int:
        return ord(word[0])

    def spell(self, token: int) -> str:
        return chr(token)


def test_ways_to_write_an_answer() -> None:
    count, other = "How many cows are in the image?", "Are the cows plastic?"
    assert set(ways_to_write(count, "four", RuleSet.official)) == {
        "four",
        "Four",
        " four",
        " Four",
        "4",
        " 4",
    }
    assert set(ways_to_write(other, "Yes", RuleSet.official)) == {"Yes", "yes", " Yes", " yes"}
    assert "other" in ways_to_write(count, "eleven", RuleSet.official)
    assert "other" not in ways_to_write(count, "eleven", RuleSet.fixed)


def test_the_score_of_an_atom() -> None:
    image = Image.new("RGB", (4, 4))
    answerer = Letters({"f": 0.25, "F": 0.125, "4": 0.0625, " ": 0.5})
    question = "How many cows are in the image?"
    # four, Four, 4, and the space three times: a quirk that the other protocol repairs.
    assert score_atom(answerer, image, question, "four", RuleSet.official) == 0.25 + 0.125 + 0.0625 + 3 * 0.5
    assert score_atom(answerer, image, question, "four", RuleSet.fixed) == 0.25 + 0.125 + 0.0625
    assert answerer.asked == [f"{question} Answer in one word."] * 2
    assert score_atom(Letters({"Y": 0.5, "y": 0.25}), image, "Is it?", "Yes", RuleSet.official) == 0.75


def test_sums_by_hand() -> None:
    scores = [[0.5, 1.0, 1.0, 0.25, 0.5, 1.0, 1.0], [0.25]]
    pictures = [
        Picture(ImageRequest(prompt["prompt"], number, 0, Path("x.png")), None)
        for number, prompt in enumerate((COWS, CAT))
    ]
    found = summarise(scores, [COWS, CAT]) | means(scores, pictures)
    first = math.prod(scores[0]) ** (1 / 7)
    assert found["soft_tifa_am"] == pytest.approx(100 * (5.25 / 7 + 0.25) / 2)
    assert found["soft_tifa_gm"] == pytest.approx(100 * (first + 0.25) / 2)
    assert found["skills_am"] == pytest.approx(
        {"attribute": 100, "count": 50, "object": 100 * 2.25 / 3, "position": 25}
    )
    assert found["atomicities_gm"] == pytest.approx({"3": 25, "7": 100 * first})
    assert geometric_mean([0.0, 1.0]) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"skills": ["object"] * 6}, "7 questions and 6 skills"),
        ({"skills": ["taste"] * 7}, "skills"),
        ({"vqa_list": [["a"]]}, "vqa_list"),
    ],
)
def test_data_of_others(tmp_path: Path, change: dict[str, object], words: str) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({**COWS, **change}) + "\n")
    with pytest.raises(UserError, match=f"Line 1 of .*{words}"):
        read_prompts(tmp_path / "data.jsonl")


def test_the_answer_is_what_transformers_generates(tmp_path: Path) -> None:
    model = save_answerer(tmp_path)
    answerer = Qwen3VL(str(tmp_path))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))
    found = answerer.first_token(image, "Are there cows?")
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)
    # The same through transformers' own generation, with the conversation put together by hand.
    pixels = answerer.processor(images=[image], return_tensors="pt")
    assert pixels["image_grid_thw"].tolist() == [[1, 6, 8]]
    places = "<|vision_start|>" + "<|image_pad|>" * 12 + "<|vision_end|>"  # two by two patches each
    text = f"<|im_start|>user\n{places}Are there cows?<|im_end|>\n<|im_start|>assistant\n"
    tokens = answerer.tokenizer(text, return_tensors="pt")["input_ids"]
    kinds = (tokens == model.config.image_token_id).int()
    assert kinds.sum() == 12
    output = model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), mm_token_type_ids=kinds, **pixels, max_new_tokens=1,
        do_sample=False, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    torch.testing.assert_close(found, output.scores[0][0].softmax(-1), rtol=1e-4, atol=1e-6)
    assert answerer.spell(answerer.first_token_of("Yes")) == "Y"
    other = answerer.first_token(Image.new("RGB", (24, 32)), "Are there cows?")
    assert not torch.allclose(found, other, atol=1e-4)  # it looks


# Of pictures of noise with sides [height, width]: what transformers' processor for torchvision 0.29 gives.
TORCHVISIONS = {
    (16, 333, 500): "caed58ca36c9182e", (16, 30, 47): "b86c60246378a6bb",
    (4, 333, 500): "67e4bf1b615b400a", (4, 30, 47): "fd56bc7f53d4628a",
}  # fmt: skip


@pytest.mark.parametrize(("patch_size", "height", "width"), list(TORCHVISIONS))
def test_what_the_model_sees_is_torchvisions(patch_size: int, height: int, width: int) -> None:
    bounds = {16: (65536, 16777216), 4: (64, 1024)}[patch_size]  # pixels; 16 as in the published file
    size = {"shortest_edge": bounds[0], "longest_edge": bounds[1]}
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if patch_size == 16 else {}
    processor = QwenPixels(patch_size=patch_size, size=size, **settings)
    noise = np.random.default_rng(6).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels = processor(images=[Image.fromarray(noise)], return_tensors="pt")["pixel_values"]
    assert (
        hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:16] == TORCHVISIONS[patch_size, height, width]
    )


def test_a_picture_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    save_answerer(tmp_path / "answerer")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))
    quarter = Image.Exif()
    quarter[0x0112] = 6  # to be turned to the right
    scores = {}
    for name, exif, image in (
        ("turned", None, noise.transpose(Image.Transpose.ROTATE_270)), ("as it is", None, noise), ("exif", quarter, noise),
    ):  # fmt: skip
        folder = tmp_path / name / "images"
        folder.mkdir(parents=True)
        image.save(folder / "00000.png", **({"exif": exif} if exif else {}))
        sampling = Sampling(str(folder), 1, 7.0, 0, 1)
        settings = Settings(tmp_path / name / "out", answerer=str(tmp_path / "answerer"))
        evaluate_geneval2([CAT], sampling, settings, lambda title: None)
        scores[name] = json.loads((settings.out / "results.json").read_text())["soft_tifa_am"]
    assert scores["exif"] == scores["turned"]
    assert scores["as it is"] != scores["turned"]


def test_the_whole(tmp_path: Path) -> None:
    save_pipeline(tmp_path / "model")
    save_answerer(tmp_path / "answerer")
    (tmp_path / "data.jsonl").write_text(json.dumps(COWS) + "\n" + json.dumps(CAT) + "\n")
    command = [
        "eval", "geneval2", str(tmp_path / "model"), "--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "out"),
        "--answerer", str(tmp_path / "answerer"), "--steps", "1",
    ]  # fmt: skip
    code, errors = rmoe(*command)
    assert code == 0, errors
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["prompts"], results["atoms"]) == (2, 8)
    assert results["differences"] == [
        f"asked of {tmp_path / 'answerer'}, not of Qwen/Qwen3-VL-8B-Instruct", "not the published 800 prompts",
    ]  # fmt: skip
    assert 0 < results["soft_tifa_gm"] <= results["soft_tifa_am"]
    answerer = Qwen3VL(str(tmp_path / "answerer"))
    with Image.open(tmp_path / "out" / "images" / "00001.png") as image:
        atom = score_atom(answerer, image, "Is there a cat?", "Yes", RuleSet.official)
    assert results["atomicities_gm"]["3"] == pytest.approx(100 * atom, rel=1e-5)
    assert (tmp_path / "out" / "gallery.png").is_file()
