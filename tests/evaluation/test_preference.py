"""PickScore and HPSv3 against formulas written out, folders of pictures with their prompts, and the whole of it."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPModel, CLIPTokenizer

from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.preference import evaluate as preference
from rmoe_megatron.evaluation.preference.captioned_folder import read_pictures
from rmoe_megatron.evaluation.preference.evaluate import ScorerName, Settings, evaluate_preference
from rmoe_megatron.evaluation.preference.hpsv3 import HPSv3, Instruction, read_instruction
from rmoe_megatron.evaluation.preference.pickscore import PickScore
from rmoe_megatron.inference.provenance import png_with
from tests.support.commands import rmoe
from tests.support.judges import save_clip, save_hpsv3

CPU = torch.device("cpu")
INSTRUCTION = "Look at it. It shows {text_prompt}\n\nRate: <|Reward|>\n\nEND"


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_pickscore_is_the_cosine_times_the_scale(tmp_path: Path) -> None:
    save_clip(tmp_path)
    scorer = PickScore(tmp_path, tmp_path, CPU)
    image, prompt = noise(32, 24), "a cat " * 40  # more than 77 tokens
    # 24 becomes 16, 32 becomes 21, of which the middle 16 rows stay: from the third on.
    square = image.resize((16, 21), Image.Resampling.BICUBIC).crop((0, 2, 16, 18))
    means, deviations = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = (np.asarray(square) / 255 - means) / deviations
    model = CLIPModel.from_pretrained(tmp_path).eval()
    tokens = CLIPTokenizer.from_pretrained(tmp_path)(
        [prompt], truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        output = model(
            pixel_values=torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None], **tokens
        )
    one, other = (each[0].double().numpy() for each in (output.image_embeds, output.text_embeds))
    cosine = one @ other / (np.linalg.norm(one) * np.linalg.norm(other))
    expected = np.exp(model.logit_scale.item()) * cosine
    assert scorer.score(image, prompt) == pytest.approx(expected, rel=1e-4)
    assert scorer.score(image, "a dog") != pytest.approx(expected, rel=1e-2)


def test_hpsv3_is_the_heads_mean_at_its_token(tmp_path: Path) -> None:
    model, head = save_hpsv3(tmp_path / "weights", tmp_path / "base")
    scorer = HPSv3(tmp_path / "weights", tmp_path / "base", Instruction(INSTRUCTION), CPU, torch.float32)
    prompt = "a {text_prompt} cat"
    found = scorer.score(noise(40, 40), prompt)
    # 256 patches of 8 x 8 pixels are 128 x 128; the tokens are put together by hand.
    image = noise(40, 40).resize((128, 128), Image.Resampling.BICUBIC)
    pixels = scorer.processor(images=[image], return_tensors="pt")
    assert pixels["image_grid_thw"].tolist() == [[1, 32, 32]]
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 256
        + f"<|vision_end|>\nLook at it. It shows {prompt}\n\nRate: <|Reward|>\n\nEND\n<|im_end|>\n<|im_start|>assistant\n"
    )  # fmt: skip
    tokens = scorer.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        embedded = model.model.language_model.embed_tokens(tokens)
        seen = model.model.visual(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"]).pooler_output
        embedded[tokens == model.config.image_token_id] = seen
        states = model.model.language_model(
            inputs_embeds=embedded, position_ids=torch.arange(tokens.shape[1]).expand(3, 1, -1)
        ).last_hidden_state[0]
        (place,) = (tokens[0] == model.config.text_config.vocab_size - 1).nonzero()[0].tolist()
        value = states[place]
        for name in ("0", "3", "5"):
            value = head[f"rm_head.{name}.weight"] @ value + head[f"rm_head.{name}.bias"]
            value = nn.functional.relu(value) if name != "5" else value
    assert found == pytest.approx(float(value[0]), rel=1e-3, abs=1e-5)
    assert found != pytest.approx(float(value[1]), rel=1e-2)
    assert scorer.score(noise(40, 40), "a dog") != pytest.approx(found, rel=1e-4)
    low = HPSv3(tmp_path / "weights", tmp_path / "base", Instruction(INSTRUCTION), CPU)
    assert low.model.dtype is torch.bfloat16
    assert low.head[0].weight.dtype is torch.float32


def test_an_instruction_has_both_places(tmp_path: Path) -> None:
    path = tmp_path / "instruction.txt"
    path.write_text(f"\n{INSTRUCTION}\n")
    found = read_instruction(path)
    assert found.text == INSTRUCTION
    assert not found.is_published
    path.write_text("It shows {text_prompt}")
    with pytest.raises(UserError, match="has <|Reward|> 0 times, not once".replace("|", "[|]")):
        read_instruction(path)


def save_pictures(folder: Path, prompts: list[str | None]) -> None:
    folder.mkdir(parents=True)
    for number, prompt in enumerate(prompts):
        record = {} if prompt is None else {"prompt": prompt}
        (folder / f"{number}.png").write_bytes(png_with(noise(16, 16, number), record))


def test_prompts_of_a_folder(tmp_path: Path) -> None:
    save_pictures(tmp_path / "made" / "a", ["a dog", "a cat", "a dog"])
    pictures, problems = read_pictures(tmp_path / "made", None, False)
    assert [(each.request.prompt, each.request.prompt_index) for each in pictures] == [
        ("a dog", 1),
        ("a cat", 0),
        ("a dog", 1),
    ]
    assert problems == {}
    save_pictures(tmp_path / "other", [None, None])
    with pytest.raises(UserError, match="0.png does not say what it was made of; give --captions FILE"):
        read_pictures(tmp_path / "other", None, False)
    captions = tmp_path / "captions.jsonl"
    captions.write_text(
        '{"file_name": "0.png", "text": "x"}\n{"file_name": "./1.png", "text": "y", "more": 1}\n'
    )
    pictures, _ = read_pictures(tmp_path / "other", captions, False)
    assert [each.request.prompt for each in pictures] == ["x", "y"]
    for line, words in (
        ('{"file_name": "../0.png", "text": "x"}', "outside of the folder"),
        ('{"file_name": "0.png"}', "Line 1 of .*text"),
        ('{"file_name": "0.png", "text": "x"}\n' * 2, "names 0.png again"),
        ('{"file_name": "0.png", "text": "x"}', "1 are more than were asked for, 1.png the first"),
        ('{"file_name": "2.png", "text": "x"}', "it lacks 1 of 1 images, 2.png the first"),
    ):
        captions.write_text(line)
        with pytest.raises(UserError, match=words):
            read_pictures(tmp_path / "other", captions, False)


def test_the_results_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt counts once, however many pictures it has."""
    save_pictures(tmp_path / "made", ["a dog", "a cat", "a dog"])

    class Scorer:
        def to(self, device: torch.device) -> "Scorer":
            return self

        def score(self, image: Image.Image, prompt: str) -> float:
            number = next(n for n in range(3) if (np.asarray(image) == np.asarray(noise(16, 16, n))).all())
            return [3.0, 10.0, 5.0][number]

    monkeypatch.setattr(preference, "_load", lambda settings: Scorer())
    monkeypatch.setattr(preference, "_judge_record", lambda settings: {"weights_sha256": "w"})
    settings = Settings(tmp_path / "made", tmp_path / "out", ScorerName.pickscore, weights="mine")
    evaluate_preference(settings, lambda title: None)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    # Means of the two prompts are 4 and 10; the mean of two draws of them has a deviation of 6 / 8^(1/2).
    assert results.pop("standard_error") == pytest.approx(6 / 8**0.5, rel=0.05)
    for name in ("sampling", "judge", "prompt_set"):
        results.pop(name)
    assert results == {
        "benchmark": "PickScore", "protocol": "weights w", "folder": str(tmp_path / "made"), "score": 7.0, "prompts": 2, "images": 3,
        "scorer": {"weights": "mine", "base": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"},
        "differences": ["weights of mine, not of yuvalkirstain/PickScore_v1"],
        "prompt_scores": {"prompts": {"a cat": 10.0, "a dog": 4.0}},
    }  # fmt: skip


def test_the_whole(tmp_path: Path) -> None:
    save_clip(tmp_path / "clip")
    save_hpsv3(tmp_path / "weights", tmp_path / "base")
    (tmp_path / "instruction.txt").write_text(INSTRUCTION)
    for name, prompts in (("one", ["a cat", "a dog"]), ("two", ["a cat", "a dog"])):
        save_pictures(tmp_path / name, list(prompts))
    noise(16, 16, 9).save(tmp_path / "two" / "plain.png")
    scored = {}
    for folder, more in (
        ("one", []),
        ("two", ["--captions", str(tmp_path / "captions.jsonl"), "--allow-incomplete"]),
    ):
        (tmp_path / "captions.jsonl").write_text(
            '{"file_name": "plain.png", "text": "a cat"}\n{"file_name": "1.png", "text": "a dog"}\n'
        )
        code, errors = rmoe(
            "eval", "preference", str(tmp_path / folder), "--scorer", "pickscore", "--weights", str(tmp_path / "clip"),
            "--base", str(tmp_path / "clip"), "--out", str(tmp_path / f"p_{folder}"), *more,
        )  # fmt: skip
        assert code == 0, errors
        scored[folder] = json.loads((tmp_path / f"p_{folder}" / "results.json").read_text())
    scorer = PickScore(tmp_path / "clip", tmp_path / "clip", CPU)
    assert scored["one"]["prompt_scores"]["prompts"]["a cat"] == pytest.approx(
        scorer.score(noise(16, 16, 0), "a cat"), rel=1e-5
    )
    assert scored["two"]["prompt_scores"]["prompts"]["a cat"] == pytest.approx(
        scorer.score(noise(16, 16, 9), "a cat"), rel=1e-5
    )
    assert scored["two"]["sampling"]["folder"] == {"too_many": ["0.png"]}
    assert scored["two"]["differences"][-1].endswith("1 too many")
    code, errors = rmoe(
        "eval", "compare", str(tmp_path / "p_one"), str(tmp_path / "p_two"), "--out", str(tmp_path / "c")
    )
    assert code == 0, errors
    (group,) = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert group["results"][1]["difference"]["prompts"] == 2
    code, errors = rmoe(
        "eval", "preference", str(tmp_path / "one"), "--scorer", "hpsv3", "--weights", str(tmp_path / "weights"), "--base",
        str(tmp_path / "base"), "--out", str(tmp_path / "h"), "--instruction", str(tmp_path / "instruction.txt"),
    )  # fmt: skip
    assert code == 0, errors
    results = json.loads((tmp_path / "h" / "results.json").read_text())
    digest = hashlib.sha256(INSTRUCTION.encode()).hexdigest()
    weights = hashlib.sha256((tmp_path / "weights" / "HPSv3.safetensors").read_bytes()).hexdigest()[:16]
    assert results["protocol"] == f"weights {weights}, instruction {digest[:16]}"
    assert any(digest[:16] in each for each in results["differences"])


def test_what_is_wrong_is_said_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pictures(tmp_path / "made", ["a dog"])
    monkeypatch.setattr(preference, "_load", lambda settings: pytest.fail("it is loaded"))
    where = tmp_path / "made", tmp_path / "out"
    for settings, words in (
        (Settings(*where, ScorerName.hpsv3), "--scorer hpsv3 needs --instruction FILE"),
        (Settings(*where, ScorerName.pickscore, instruction=Instruction("x")), "no other scorer takes one"),
        (Settings(*where, ScorerName.pickscore, weights=str(tmp_path / "nowhere")), "There is no folder"),
        (Settings(tmp_path / "made", tmp_path / "made" / "o", ScorerName.pickscore), "outside of it"),
        (Settings(tmp_path / "none", tmp_path / "out", ScorerName.pickscore), "There is no folder"),
    ):
        with pytest.raises(UserError, match=words):
            evaluate_preference(settings, lambda title: None)


def test_weights_of_others(tmp_path: Path) -> None:
    save_hpsv3(tmp_path / "weights", tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    config["num_hidden_layers"] = 3
    path.write_text(json.dumps(config))
    with pytest.raises(
        UserError, match="does not hold the weights of HPSv3 on .*missing language_model.layers.2"
    ):
        HPSv3(tmp_path / "weights", tmp_path / "base", Instruction(INSTRUCTION), CPU)
