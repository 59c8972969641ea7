"""What layers lose in low precision: products against float64, and the command on a real run."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from rmoe_megatron.diagnostics.precision import ALL_RECIPES, Loss, products, worst
from rmoe_megatron.model.quantization import NVFP4, RECIPES
from tests.support.commands import rmoe
from tests.support.runs import make_run

LAYERS = {
    f"{part}.{layer}" for part, layers in {
        "attention": ("linear_qkv", "linear_qkv_context", "linear_proj", "linear_proj_context"),
        "mlp": ("linear_fc1", "linear_fc2"), "mlp_context": ("linear_fc1", "linear_fc2"),
    }.items() for layer in layers
}  # fmt: skip


def test_every_layer_is_measured_under_every_recipe(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    assert (
        rmoe(
            "train", str(config), "training.steps=4", "optimizer.warmup_steps=1", "training.sample_prompts=[]"
        )[0]
        == 0
    )
    code, errors = rmoe("diagnose", "precision", str(tmp_path / "run"), "--batches", "2")
    assert code == 0, errors
    found = [
        Loss(**each) for each in json.loads((tmp_path / "run" / "precision" / "precision.json").read_text())
    ]
    last = {
        name
        for name in LAYERS
        if not name.startswith("mlp_context") and name != "attention.linear_proj_context"
    }
    expected = {(block, name) for block in (0, 1) for name in LAYERS} | {(2, name) for name in last}
    for recipe in ALL_RECIPES:
        measured = [each for each in found if each.recipe == recipe]
        assert {(each.block, each.layer) for each in measured} == expected
        assert len(measured) == len(expected)
        low, high = (0.01, 0.5) if recipe == "nvfp4" else (0.001, 0.15)
        for each in measured:
            assert low < each.output < high, each
            assert low < each.weight_gradient < high, each
    with Image.open(tmp_path / "run" / "precision" / "precision.png") as picture:
        assert min(picture.size) > 300


def test_products_are_those_of_rounded_operands() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, weight, gradient = (
        torch.randn(size, generator=generator) for size in ((32, 48), (16, 48), (32, 16))
    )
    exact = (
        tokens.double() @ weight.double().t(),
        gradient.double() @ weight.double(),
        gradient.double().t() @ tokens.double(),
    )
    for recipe in RECIPES.values():
        for rounded, true in zip(products(recipe, tokens, weight, gradient), exact, strict=True):
            assert 0 < (rounded - true).norm() < 0.06 * true.norm()
    for rounded, true in zip(products(NVFP4, tokens, weight, gradient), exact, strict=True):
        assert 0.05 * true.norm() < (rounded - true).norm() < 0.25 * true.norm()


def test_the_worst_come_first() -> None:
    losses = [
        Loss(0, "a", "mxfp8", 0.1, 0.0, 0.0),
        Loss(1, "a", "mxfp8", 0.0, 0.3, 0.0),
        Loss(2, "a", "nvfp4", 1, 1, 1),
    ]
    assert [each.block for each in worst(losses, "mxfp8", 5)] == [1, 0]
    assert len(worst(losses, "mxfp8", 1)) == 1


@pytest.mark.parametrize("name", ["missing", "."])
def test_no_run_is_said(tmp_path: Path, name: str) -> None:
    code, errors = rmoe("diagnose", "precision", str(tmp_path / name))
    assert code == 2
    assert errors.count("\n") == 1
    assert errors.startswith("error: ")
