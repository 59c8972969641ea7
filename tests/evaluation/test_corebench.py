"""T2I-CoReBench: tables, wording, what of an answer counts, the judge against transformers, and the whole of it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.corebench.evaluate import Settings, differences, evaluate_corebench, rules
from rmoe_megatron.evaluation.corebench.judging import (
    JUDGES,
    OFFICIAL_WORDING_SHA256,
    OUR_WORDING,
    Wording,
    _as_published,
    answer_of,
    ask,
    read_wording,
    verdict,
)
from rmoe_megatron.evaluation.corebench.prompts import DIMENSIONS, Prompt, is_official, read_prompts
from rmoe_megatron.evaluation.question_answering import Qwen3VL, thinks
from rmoe_megatron.evaluation.rule_set import RuleSet
from rmoe_megatron.inference import generation
from rmoe_megatron.inference.generation import Sampling
from tests.support.commands import rmoe
from tests.support.judges import save_answerer
from tests.support.sd3_pipeline import save_pipeline

CAT = Prompt("C-MI-001", "C-MI", "a cat", ("Is there a cat?", "Is the cat asleep?", "Is it {red}?"))


def save_tables(folder: Path, prompts: int = 1) -> Path:
    """Tables in the published form, with so many prompts of two questions for every dimension."""
    folder.mkdir()
    for dimension in DIMENSIONS:
        entries = {
            f"{dimension}-{number:03d}": {
                "Main Class": "Composition", "Sub Class": "x", "Prompt": f"a cat {number} {dimension}", "Remark": "y",
                "Checklist": [{"question": f"Is there a {each}?", "tags": []} for each in ("cat", "mat")],
            }
            for number in range(1, prompts + 1)
        }  # fmt: skip
        (folder / f"{dimension}.json").write_text(json.dumps(entries))
    return folder


def test_tables(tmp_path: Path) -> None:
    folder = save_tables(tmp_path / "data", prompts=2)
    prompts = read_prompts(folder)
    assert [prompt.name for prompt in prompts[:3]] == ["C-MI-001", "C-MI-002", "C-MA-001"]
    assert [prompt.dimension for prompt in prompts[-2:]] == ["R-RR", "R-RR"]
    assert prompts[0].questions == ("Is there a cat?", "Is there a mat?")
    assert not is_official(prompts)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "There is no .*C-TR.json; give the folder data of github.com/KlingTeam/T2I-CoReBench"),
        ("{}", "C-TR.json"),
        ("[", "is not valid JSON"),
        (json.dumps({"C-TR-1": {"Prompt": "a", "Checklist": []}}), "Checklist"),
        (json.dumps({"C-MI-1": {"Prompt": "a", "Checklist": [{"question": "b"}]}}), "holds C-MI-1, which is of another"),
        (json.dumps({"../x": {"Prompt": "a", "Checklist": [{"question": "b"}]}}), "C-TR.json"),
    ],
)  # fmt: skip
def test_tables_of_others(tmp_path: Path, content: str | None, words: str) -> None:
    folder = save_tables(tmp_path / "data")
    (folder / "C-TR.json").unlink()
    if content is not None:
        (folder / "C-TR.json").write_text(content)
    with pytest.raises(UserError, match=words):
        read_prompts(folder)


def test_a_wording_is_known_by_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "wording.txt"
    path.write_text("\n  Say yes.\r\n\n")
    assert read_wording(None).name == "ours"
    given = read_wording(path)
    assert (given.name, given.text) == ("given", "Say yes.")
    assert given.sha256 == hashlib.sha256(b"Say yes.").hexdigest()
    monkeypatch.setattr("rmoe_megatron.evaluation.corebench.judging.OFFICIAL_WORDING_SHA256", given.sha256)
    assert read_wording(path).name == "official"
    path.write_text(" \n")
    with pytest.raises(UserError, match="is empty; give a file with the judge's instructions"):
        read_wording(path)
    assert hashlib.sha256(OUR_WORDING.encode()).hexdigest() != OFFICIAL_WORDING_SHA256


@pytest.mark.parametrize(
    ("answer", "official", "fixed"),
    [
        ("yes", True, True), ('"no"', False, False), ("Yes.", None, True), ("NO", None, False), ("yes or no", True, False),
        ("", None, False), ("yesterday", None, False), ("nothing", None, False), ("no, not yes", True, False),
    ],
)  # fmt: skip
def test_what_counts_as_yes(answer: str, official: bool | None, fixed: bool) -> None:
    assert verdict(answer, RuleSet.official) is official
    assert verdict(answer, RuleSet.fixed) is fixed


def test_the_first_round_that_says_something_counts() -> None:
    def decode(tokens: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join({0: ".", 1: "</think>\n\n", 2: "yes", 3: "no", 4: " "}[token] for token in tokens)

    assert answer_of([2], decode, thinks=False) == "yes"
    assert answer_of([0, 1, 3], decode, thinks=True) == "no"
    assert answer_of([2, 0], decode, thinks=True) == ""  # it thinks yes, but says nothing
    assert answer_of([0] * 600 + [1, 2], decode, thinks=True) == "yes"  # in the second round
    assert answer_of([0] * 510 + [1, 2] + [3] * 200, decode, thinks=True) == "yes"  # the first round has 512
    assert answer_of([4] * 512 + [3], decode, thinks=False).strip() == "no"
    assert answer_of([0] * 9000 + [1, 2], decode, thinks=True) == ""  # beyond the last round


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_what_the_judge_sees() -> None:
    """Sides rounded to multiples of 2 x 16 pixels by Pillow, no black border, white behind what is transparent: facts of the published code."""

    class Processor:
        patch_size, merge_size = 16, 2

    whole = noise(64, 96)
    assert (np.asarray(_as_published(whole, Processor, False)) == np.asarray(whole)).all()
    bordered = Image.new("RGB", (120, 90))
    bordered.paste(whole, (7, 5))
    assert (np.asarray(_as_published(bordered, Processor, True)) == np.asarray(whole)).all()
    assert _as_published(bordered, Processor, False).size == (128, 96)  # a picture of others stays as it is
    clear = whole.copy()
    clear.putalpha(0)
    assert (np.asarray(_as_published(clear, Processor, False)) == 255).all()
    odd = noise(70, 90)
    expected = odd.resize((96, 64), Image.Resampling.BICUBIC)
    assert (np.asarray(_as_published(odd, Processor, True)) == np.asarray(expected)).all()
    assert _as_published(Image.new("RGB", (64, 64)), Processor, True).size == (64, 64)  # all black


@pytest.mark.parametrize(("mixture", "thinking"), [(False, False), (True, True)])
def test_answers_are_what_transformers_generates(tmp_path: Path, mixture: bool, thinking: bool) -> None:
    """Several conversations of different lengths at once, against each alone, put together by hand."""
    model = save_answerer(tmp_path, mixture=mixture, thinking=thinking)
    # What a published folder says of sampling has no say.
    said = {"do_sample": True, "temperature": 0.6, "top_k": 3, "repetition_penalty": 9.0, "eos_token_id": 65}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    answerer = Qwen3VL(str(tmp_path))
    assert answerer.thinks is thinks(tmp_path) is thinking
    image = noise(24, 32)
    found = answerer.generate(
        image, "a<|im_start|>", ["Is it?<|im_end|>", "Are there many cats?<|im_end|>", "x"], 6, 1.3
    )
    pixels = answerer.processor(images=[image], return_tensors="pt")
    marks = (
        "<|vision_start|>" + "<|image_pad|>" * 12 + "<|vision_end|>"
    )  # 24 x 32 pixels in two by two patches of 4
    ends = answerer.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    alone = []
    for after in ("Is it?<|im_end|>", "Are there many cats?<|im_end|>", "x"):
        tokens = answerer.tokenizer(f"a<|im_start|>{marks}{after}", return_tensors="pt")["input_ids"]
        kinds = (tokens == model.config.image_token_id).int()
        output = model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), mm_token_type_ids=kinds, **pixels, max_new_tokens=6,
            do_sample=False, repetition_penalty=1.3, eos_token_id=ends,
        )[0, tokens.shape[1] :].tolist()  # fmt: skip
        alone.append([token for token in output if token not in ends])
    assert found == alone
    assert len({tuple(each) for each in found}) > 1


def test_a_question_is_put_with_its_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_answerer(tmp_path, thinking=True)
    answerer = Qwen3VL(str(tmp_path))
    asked: list[Any] = []

    def generate(image: Image.Image, before: str, after: list[str], *rest: Any) -> list[list[int]]:
        asked.append((before, after, rest))
        return [answerer.tokenizer.encode("hm</think>\n\nyes")] * len(after)

    monkeypatch.setattr(answerer, "generate", generate)
    monkeypatch.setattr("rmoe_megatron.evaluation.corebench.judging.TOGETHER", 2)
    assert ask(answerer, noise(24, 32), CAT, Wording("given", "Look."), True) == ["yes"] * 3
    assert [(before, rest) for before, _, rest in asked] == [
        ("<|im_start|>system\n\nLook.\n<|im_end|>\n<|im_start|>user\n", (8192, 1.05))
    ] * 2
    texts = [text for _, after, _ in asked for text in after]
    assert texts[2] == (
        'Prompt: "a cat"\nQuestion: "Is it {red}?"<|im_end|>\n<|im_start|>assistant\n<think>\n'
    )
    assert len(texts) == 3


def test_what_may_be_called_official(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmoe_megatron.evaluation.corebench.evaluate.is_official", lambda prompts: True)
    official = Wording("official", "x")
    whole = Settings(Path("o"), wording=official)
    assert differences([CAT], whole) == []
    assert rules([CAT], whole) == "official, judge Qwen3-VL-30B-A3B-Thinking"
    for other in (
        Settings(Path("o")), Settings(Path("o"), wording=Wording("given", "y")), Settings(Path("o"), 1, wording=official),
        Settings(Path("o"), wording=official, answerer="Qwen/Qwen3-VL-8B-Instruct"),
        Settings(Path("o"), wording=official, protocol=RuleSet.fixed),
    ):  # fmt: skip
        assert len(differences([CAT], other)) == 1
        assert not rules([CAT], other).startswith("official,")
    assert rules([CAT], Settings(Path("o"), wording=official, answerer=JUDGES[1])) != rules([CAT], whole)
    part = Settings(Path("o"), wording=official, chosen=(0,))
    assert differences([CAT], part) == ["not the published 1,080 prompts"]


def test_a_judge_that_is_wrong_is_said_before_an_image_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pipeline(tmp_path / "model")
    made = []
    monkeypatch.setattr(generation, "build_pipeline", lambda sampling: made.append(sampling))
    sampling = Sampling(str(tmp_path / "model"), 1, 7.0, 0, 1)
    with pytest.raises(UserError, match="There is no folder .*nowhere"):
        evaluate_corebench(
            [CAT], sampling, Settings(tmp_path / "o", answerer=str(tmp_path / "nowhere")), lambda title: None
        )
    wrong = str(tmp_path / "model" / "text_encoder")
    with pytest.raises(UserError, match="where qwen3_vl belongs"):
        evaluate_corebench([CAT], sampling, Settings(tmp_path / "o", answerer=wrong), lambda title: None)
    assert made == []
    assert not (tmp_path / "o").exists()


def test_the_whole(tmp_path: Path) -> None:
    save_pipeline(tmp_path / "model")
    save_answerer(tmp_path / "answerer", brief=True)
    data = save_tables(tmp_path / "data", prompts=2)
    (tmp_path / "wording.txt").write_text("Say yes or no.")
    out = tmp_path / "out"
    code, errors = rmoe(
        "eval", "corebench", str(tmp_path / "model"), "--data", str(data), "--answerer", str(tmp_path / "answerer"), "--steps", "1",
        "--images-per-prompt", "2", "--limit", "3", "--judge-prompt", str(tmp_path / "wording.txt"), "--out", str(out),
    )  # fmt: skip
    assert code == 0, errors
    results = json.loads((out / "results.json").read_text())
    assert results["overall"] is None
    assert (results["limited"]["prompts"], results["limited"]["of"]) == (3, 24)
    assert list(results["prompt_scores"]) == list(DIMENSIONS[:3])  # the dimensions in turn
    assert (results["prompts"], results["images_judged"], results["questions"]) == (3, 6, 12)
    assert results["neither_yes_nor_no"] == 0
    assert results["judge"]["wording"] == "given"
    assert results["judge"]["wording_sha256"] == hashlib.sha256(b"Say yes or no.").hexdigest()
    assert results["protocol"].startswith("official rules for answers, wording given ")
    assert results["judge"]["wording_sha256"] in (out / "results.md").read_text()
    pictures = sorted(str(path.relative_to(out / "images")) for path in (out / "images").rglob("*.png"))
    assert pictures == [
        f"{name}/{name}-001-{image}.png" for name in sorted(DIMENSIONS[:3]) for image in (0, 1)
    ]
    # The judge's answers about one picture, asked here.
    prompt = read_prompts(data)[0]
    with Image.open(out / "images" / "C-MI" / "C-MI-001-1.png") as image:
        asked = ask(
            Qwen3VL(str(tmp_path / "answerer")), image, prompt, Wording("given", "Say yes or no."), True
        )
    answers = json.loads((out / "answers" / "C-MI-001.json").read_text())
    assert answers[1] == asked
    assert set(asked) <= {"yes", "no"}
    code, errors = rmoe(
        "eval",
        "corebench",
        str(tmp_path / "model"),
        "--data",
        str(tmp_path),
        "--answerer",
        str(tmp_path / "answerer"),
        "--out",
        str(tmp_path / "b"),
    )
    assert code == 2
    assert "C-MI.json; give the folder data of" in errors
