"""What layers lose in low precision: products against float64, and the command on a real run."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from rmoe_megatron.diagnostics.precision import ALL_RECIPES, Loss, diagnose_precision, products, worst
from rmoe_megatron.model.quantization import NVFP4, RECIPES
from tests.support.commands import rmoe
from tests.support.runs import array, make_run, write_shard

LAYERS = {
    f"{part}.{layer}" for part, layers in {
        "attention": ("linear_qkv", "linear_qkv_context", "linear_proj", "linear_proj_context"),
        "mlp": ("linear_fc1", "linear_fc2"), "mlp_context": ("linear_fc1", "linear_fc2"),
    }.items() for layer in layers
}  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, one of whose samples cannot be read; where it was trained there is a file now."""
    folder = tmp_path_factory.mktemp("trained")
    config = make_run(folder)
    members = ("latents.npy", "text_hidden_states.npy", "text_pooled.npy")
    write_shard(folder / "data" / "train" / "z.tar", [dict.fromkeys(members, b"no array")])
    settings = ["training.steps=4", "optimizer.warmup_steps=1", "training.sample_prompts=[]"]
    code, errors = rmoe("train", str(config), *settings)
    assert code == 0, errors
    shutil.rmtree(folder / "data" / "val")
    moved = (folder / "run").rename(folder / "moved")
    (folder / "run").touch()
    return moved


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    found = {path: path.stat() for path in [folder, *folder.rglob("*")]}
    return {path: (status.st_size, status.st_mtime_ns) for path, status in found.items()}


def test_a_run_is_only_read(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs no room for checkpoints, none of the folders that training writes to, and no validation samples."""
    before = files(run_dir)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    diagnose_precision(run_dir, tmp_path / "out", batches=9)  # of 4 samples each: all there are
    assert files(run_dir) == before
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"precision.json", "precision.png"}


def test_an_output_that_cannot_be_written_is_said_at_once(run_dir: Path) -> None:
    code, errors = rmoe("diagnose", "precision", str(run_dir), "--out", "/dev/null/out")
    assert code == 2
    assert errors == (
        "error: --out /dev/null/out cannot be written: /dev/null is a file; choose another folder.\n"
    )


def test_every_layer_is_measured_under_every_recipe(run_dir: Path, tmp_path: Path) -> None:
    code, errors = rmoe("diagnose", "precision", str(run_dir), "--batches", "2", "--out", str(tmp_path))
    assert code == 0, errors
    found = [Loss(**each) for each in json.loads((tmp_path / "precision.json").read_text())]
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
    with Image.open(tmp_path / "precision.png") as picture:
        assert min(picture.size) > 300


def test_samples_are_those_of_the_checkpoints_stage(tmp_path: Path) -> None:
    """Each stage has latents of its own size in a folder of its own; that of the other stage is not there."""
    config = make_run(tmp_path)
    sides = {"train": 8, "small": 4}
    small = {
        "latents.npy": array(np.random.default_rng(0).standard_normal((3, 4, 4))),
        "text_hidden_states.npy": array(np.ones((6, 384))),
        "text_pooled.npy": array(np.ones(384)),
    }
    write_shard(tmp_path / "data" / "small" / "a.tar", [small] * 16)
    stages = [
        f"{{steps: 2, sample_size: {side}, train: {tmp_path}/data/{name}}}" for name, side in sides.items()
    ]
    code, errors = rmoe(
        "train", str(config), f"training.stages=[{', '.join(stages)}]", "training.steps=4",
        "checkpoint.every=2", "optimizer.warmup_steps=1", "training.sample_prompts=[]", "data.validation=null",
    )  # fmt: skip
    assert code == 0, errors
    run_dir, data = tmp_path / "run", tmp_path / "data"
    train = (data / "train").rename(tmp_path / "elsewhere")
    code, errors = rmoe("diagnose", "precision", str(run_dir), "--batches", "1")
    assert code == 0, errors
    shutil.rmtree(run_dir / "checkpoints" / "step-00000004")
    shutil.rmtree(data / "small")
    train.rename(data / "train")
    code, errors = rmoe("diagnose", "precision", str(run_dir), "--batches", "1")
    assert code == 0, errors


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
