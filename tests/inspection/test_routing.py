"""Figures and pictures of what the gates of a trained model decide: by hand, and against the gates' own answers."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rmoe_megatron.conversion.export import export_run
from rmoe_megatron.errors import UserError
from rmoe_megatron.hf.recurrence import Gate
from rmoe_megatron.inference.sampling import open_pipeline, sample_images
from rmoe_megatron.inspection.routing import RoutingSettings, diagnose_routing
from rmoe_megatron.inspection.routing_figures import (
    agreement,
    painted_by,
    principal_components,
    switch_rate,
    usage,
    usage_by_word,
    words_of,
)
from rmoe_megatron.inspection.routing_pictures import as_picture
from rmoe_megatron.inspection.routing_watch import Place, watching
from tests.support.commands import rmoe
from tests.support.runs import make_run

PROMPTS = ["a red circle", "two red squares", "a blue circle", "two blue squares"]


def place(*picked: list[list[int]]) -> Place:
    """Two or more calls of the model, each with the modules [B, S]."""
    return Place(picked=[np.array(each, dtype=np.uint16) for each in picked])


def test_figures_that_are_worked_out_by_hand() -> None:
    before = place([[0, 0, 1, 2], [0, 1, 1, 2]], [[0, 0, 0, 0], [2, 2, 2, 2]])
    after = place([[0, 1, 1, 2], [0, 1, 1, 2]], [[1, 1, 0, 0], [2, 2, 2, 2]])
    assert usage(before, 4).tolist() == [[3 / 8, 3 / 8, 2 / 8, 0], [4 / 8, 0, 4 / 8, 0]]
    assert switch_rate(before, after) == pytest.approx((1 / 8 + 2 / 8) / 2)
    # Of the first call three of four tokens are alike, of the second none; by chance 9/64 + 9/64 + 4/64, and 1/4 + 1/4.
    assert agreement(before) == (pytest.approx((3 / 4 + 0) / 2), pytest.approx((22 / 64 + 1 / 2) / 2))
    assert painted_by(place([[0, 1, 2]], [[1, 1, 0]], [[1, 0, 2]]), 3).tolist() == [[1, 1, 2]]


def test_words_go_with_modules() -> None:
    assert words_of("A red circle, left-of two “Squares”") == {
        "a",
        "red",
        "circle",
        "left",
        "of",
        "two",
        "squares",
    }
    shares = {
        "a red circle": np.array([0.9, 0.1]), "red squares": np.array([0.7, 0.3]), "a blue circle": np.array([0.2, 0.8]),
        "blue crosses": np.array([0.0, 1.0]),
    }  # fmt: skip
    found = usage_by_word(shares)
    assert set(found) == {"red", "blue", "circle", "a"}  # the others are in one prompt
    assert found["red"] == pytest.approx([0.8 - 0.1, 0.2 - 0.9])
    assert found["circle"] == pytest.approx([0.55 - 0.35, 0.45 - 0.65])


def test_the_two_main_directions() -> None:
    """Points on a plane of a space of five dimensions keep their distances; the third direction has no variance."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(5, 2)))[0]
    plane = [rng.normal(size=(6, 2)) * (3, 1) for _ in range(3)]
    points, shares = principal_components([each @ basis.T + 7 for each in plane])
    assert sum(shares) == pytest.approx(1)
    assert shares[0] > shares[1]
    expected, found = np.concatenate(plane), np.concatenate(points)
    distances = [np.linalg.norm(each[:, None] - each[None], axis=-1) for each in (expected, found)]
    assert distances[1] == pytest.approx(distances[0])


def test_tokens_are_laid_out_row_by_row() -> None:
    assert as_picture(np.arange(8), (64, 32)).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert as_picture(np.arange(8), (32, 64)).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routing")
    code, errors = rmoe("train", str(make_run(folder)), "training.steps=6", "training.sample_prompts=[]")
    assert code == 0, errors
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    export_run(run, run.parent / "model")
    return run.parent / "model"


def settings(**changes: Any) -> RoutingSettings:
    return RoutingSettings(
        **{
            "prompts": PROMPTS,
            "images": 2,
            "steps": 3,
            "guidance": 2.0,
            "seed": 5,
            "dtype": "fp32",
            **changes,
        }
    )


def test_shares_are_those_of_the_gates_answers(exported: Path, tmp_path: Path) -> None:
    """Asked by hooks on the gates' outputs, of which the first half sees the prompt."""
    found = diagnose_routing(exported, tmp_path / "out", settings())
    assert [(each["block"], each["pass"], each["latent_step"]) for each in found] == [
        (block, 1, step) for block in (1, 2) for step in (1, 2)
    ]
    pipeline = open_pipeline(exported, "fp32")
    answers: list[torch.Tensor] = []
    for module in pipeline.transformer.modules():
        if isinstance(module, Gate):
            module.register_forward_hook(lambda gate, inputs, output: answers.append(output))
    for prompt in PROMPTS:
        sample_images(pipeline, [prompt] * 2, [5, 6], 3, 2.0, 2)
    # By prompt, sampling step, block and latent step; pictures with the prompt and without; tokens.
    picked = torch.stack(answers).view(len(PROMPTS), 3, 4, 4, 16)[:, :, :, :2]
    for number, each in enumerate(found):
        modules = picked[:, :, number]
        shares = [
            [(modules[:, step] == module).double().mean().item() for module in range(4)] for step in range(3)
        ]
        assert each["usage_by_timestep"] == [pytest.approx(share) for share in shares]
        assert each["usage"] == pytest.approx(np.mean(shares, axis=0).tolist())
        if number % 2:
            assert each["switch_rate"] == pytest.approx(
                (modules != picked[:, :, number - 1]).double().mean().item()
            )
        same = (modules[:, :, 0] == modules[:, :, 1]).double().mean().item()
        assert each["agreement_between_seeds"] == pytest.approx(same)


def test_watching_changes_nothing(exported: Path) -> None:
    pipeline = open_pipeline(exported, "fp32")
    alone = sample_images(pipeline, PROMPTS[:2], [1, 2], 3, 2.0, 2)
    with watching(pipeline, 2, 3):
        watched = sample_images(pipeline, PROMPTS[:2], [1, 2], 3, 2.0, 2)
    after = sample_images(pipeline, PROMPTS[:2], [1, 2], 3, 2.0, 2)
    assert np.array_equal(alone, watched)
    assert np.array_equal(alone, after)
    assert not any(module._forward_pre_hooks for module in pipeline.transformer.modules())


def test_attention_and_entropy_of_models_that_tell_nothing_apart(exported: Path) -> None:
    """Keys of zero are looked at alike: 6 of 22 tokens are text, and nothing moves. Logits of zero have the largest entropy."""
    pipeline = open_pipeline(exported, "fp32")
    with torch.no_grad():
        for name, parameter in pipeline.transformer.named_parameters():
            if name.endswith(("norm_k.weight", "norm_added_k.weight")) or ".gate." in name:
                parameter.zero_()
    with watching(pipeline, 1, 2) as routing:
        sample_images(pipeline, ["a red circle"], [0], 2, 1.0, 1)
    assert len(routing.timesteps) == 2
    for (_, _, step), each in routing.places.items():
        assert np.concatenate(each.text_share) == pytest.approx(6 / 22, rel=1e-5)
        assert np.concatenate(each.entropy) == pytest.approx(1)
        assert len(each.shift) == (0 if step == 1 else 2)
        assert np.abs(np.array(each.shift)).sum() == pytest.approx(0, abs=1e-6)


def test_the_command_takes_a_run_and_writes_a_page_that_needs_nothing_else(run: Path, tmp_path: Path) -> None:
    before = sorted(run.rglob("*"))
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    code, errors = rmoe(
        "diagnose",
        "routing",
        str(run),
        *prompts,
        "--out",
        str(tmp_path / "out"),
        "--steps",
        "2",
        "--images-per-prompt",
        "2",
    )
    assert code == 0, errors
    assert sorted(run.rglob("*")) == before
    names = {
        "maps.png",
        "usage.png",
        "words.png",
        "trajectories.png",
        "attention.png",
        "routing.json",
        "index.html",
    }
    assert {each.name for each in (tmp_path / "out").iterdir()} == names
    described = json.loads((tmp_path / "out" / "routing.json").read_text())
    assert described["prompts"] == PROMPTS
    for each in described["places"]:
        assert math.fsum(each["usage"]) == pytest.approx(1)
        assert set(each["usage_by_word"]) == {"a", "two", "red", "blue", "circle", "squares"}
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("src='data:image/png;base64,") == 5
    assert "http" not in page


def test_what_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="A prompt is given twice"):
        diagnose_routing(exported, tmp_path / "out", settings(prompts=["a", "a"]))
    code, errors = rmoe("diagnose", "routing", str(tmp_path / "nothing"), "--prompt", "a")
    assert (code, "There is no folder" in errors) == (2, True)
    dense = make_run(tmp_path / "dense")
    code, errors = rmoe(
        "train", str(dense), "recurrence=null", "training.steps=4", "training.sample_prompts=[]"
    )
    assert code == 0, errors
    with pytest.raises(UserError, match="no gate that chooses"):
        diagnose_routing(tmp_path / "dense" / "run", tmp_path / "out", settings())
    assert not (tmp_path / "out").exists()
