"""Judges are there before an image is made; the gallery shows what they found; an error has its line to itself."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rmoe_megatron.cli import app
from rmoe_megatron.cli.options import Bar
from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.dpg.evaluate import Settings as DpgSettings
from rmoe_megatron.evaluation.dpg.evaluate import _examples as dpg_examples
from rmoe_megatron.evaluation.dpg.evaluate import evaluate_dpg
from rmoe_megatron.evaluation.dpg.questions import Item, Proposition
from rmoe_megatron.evaluation.early_judge import EarlyJudge
from rmoe_megatron.evaluation.geneval.evaluate import Settings as GenEvalSettings
from rmoe_megatron.evaluation.geneval.evaluate import _examples, evaluate_geneval
from rmoe_megatron.evaluation.geneval.prompts import make_prompts
from rmoe_megatron.evaluation.geneval2.evaluate import Settings, evaluate_geneval2
from rmoe_megatron.evaluation.results import Box, Example, gallery
from rmoe_megatron.inference import generation
from rmoe_megatron.inference.generation import ImageRequest, Picture, Sampling
from tests.evaluation.test_picture_folder import prompts
from tests.support.judges import save_clip, save_detector
from tests.support.sd3_pipeline import save_pipeline


def test_a_judge_that_is_wrong_is_said_before_an_image_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders that can be told by their files, so that they fail where they are loaded and not before."""
    save_pipeline(tmp_path / "model")
    save_detector(tmp_path / "detector")
    save_clip(tmp_path / "clip")
    made = []
    monkeypatch.setattr(generation, "build_pipeline", lambda sampling: made.append(sampling))
    sampling, detector, clip = (
        Sampling(str(tmp_path / "model"), 1, 7.0, 0, 1),
        tmp_path / "detector",
        tmp_path / "clip",
    )
    wrong = str(clip)  # neither a Mask2Former nor a Qwen3-VL
    item = Item("cat", "a cat", {1: Proposition("Is there a cat?", "entity - whole", ())})
    with pytest.raises(UserError):
        evaluate_geneval(
            make_prompts()[:1], sampling, GenEvalSettings(tmp_path / "o", 1, detector=wrong, clip=str(clip)), lambda title: None
        )  # fmt: skip
    with pytest.raises(UserError):
        evaluate_geneval(
            make_prompts()[:1], sampling, GenEvalSettings(tmp_path / "o", 1, detector=str(detector), clip=str(detector)),
            lambda title: None,
        )  # fmt: skip
    with pytest.raises(UserError):
        evaluate_geneval2(prompts(1), sampling, Settings(tmp_path / "o", answerer=wrong), lambda title: None)
    with pytest.raises(UserError):
        evaluate_dpg([item], sampling, DpgSettings(tmp_path / "o", 1, answerer=wrong), lambda title: None)
    assert made == []
    assert not (tmp_path / "o").exists()


class Movable:
    def __init__(self) -> None:
        self.devices: list[torch.device] = []

    def to(self, device: torch.device) -> "Movable":
        self.devices.append(device)
        return self


def test_a_judge_waits_on_the_host_and_is_loaded_once() -> None:
    loaded: list[Movable] = []

    def load() -> Movable:
        loaded.append(Movable())
        return loaded[-1]

    judge = EarlyJudge(load, is_needed=True)
    assert [each.devices for each in loaded] == [[torch.device("cpu")]]
    assert judge() is judge() is loaded[0]
    assert len(loaded[0].devices) == 2
    unused = EarlyJudge(load, is_needed=False)
    assert len(loaded) == 1
    assert unused() is loaded[1]


def verdict(prompt: str, image: int, correct: bool) -> dict[str, object]:
    return {
        "filename": f"images/{prompt}/samples/{image:05d}.png", "tag": "counting", "prompt": prompt, "correct": correct,
        "reason": "" if correct else "expected more\nand more", "details": {"cat": [[1.0, 2.0, 11.0, 12.0, 0.9]]},
    }  # fmt: skip


def test_a_gallery_has_a_prompt_once_with_what_was_found() -> None:
    judged = [verdict(prompt, image, image < 2) for prompt in ("a", "b", "c", "d") for image in range(4)]
    examples = _examples(judged)
    right = [example for example in examples if example.heading == "right"]
    wrong = [example for example in examples if example.heading == "wrong"]
    assert [example.label for example in right] == ["a: right", "b: right", "c: right"]
    assert [example.label for example in wrong] == [f"{name}: expected more" for name in "abc"]
    assert {example.boxes for example in examples} == {(Box("cat", 1.0, 2.0, 11.0, 12.0),)}


def test_boxes_are_drawn_where_they_are(tmp_path: Path) -> None:
    Image.new("RGB", (96, 48), "black").save(tmp_path / "a.png")
    box = Box("", 24, 12, 72, 36)
    plain, drawn = (
        np.asarray(gallery([Example("x", tmp_path / "a.png", "", boxes)]), dtype=int)
        for boxes in ((), (box,))
    )
    rows, columns = np.nonzero((plain != drawn).any(axis=-1))
    # The picture of 192 x 192 begins below the title, four pixels from the left: a quarter and three quarters of it.
    top, left = 24, 4
    assert (rows.min() - top, rows.max() - top) == (48, 144)
    assert (columns.min() - left, columns.max() - left) == (48, 144)
    assert not (plain != drawn)[top + 60 : top + 130, left + 60 : left + 130].any()


def test_dpgs_gallery_tells_scores(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.png" for number in range(20)]
    grids = [
        Picture(ImageRequest(f"prompt {number}", number, 0, file), None) for number, file in enumerate(files)
    ]
    examples = dpg_examples(grids, {f"{number:05d} prompt {number}": 5.0 * number for number in range(20)})
    assert [(each.heading, each.label) for each in examples[:2]] == [
        ("best", "95.0 prompt 19"),
        ("best", "90.0 prompt 18"),
    ]
    assert (examples[-1].heading, examples[-1].label, examples[-1].path) == (
        "worst",
        "0.0 prompt 0",
        files[0],
    )
    assert len({each.path for each in examples}) == 12


def test_an_error_has_its_line_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)

    def fails() -> None:
        Bar("judge", "unit")(1, 3)
        raise UserError("the judge is gone")

    monkeypatch.setattr(app, "app", fails)
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 2
    assert "judge:" in shown.getvalue()
    assert shown.getvalue().endswith("\nerror: the judge is gone\n")
    assert json.dumps(shown.getvalue().splitlines()[-1]) == '"error: the judge is gone"'
