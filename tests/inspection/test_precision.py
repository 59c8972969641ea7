"""What layers lose in low precision: products against float64, and the command on a real run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from PIL import Image

from rmoe_megatron.checkpoint.folders import write_manifest
from rmoe_megatron.errors import UserError
from rmoe_megatron.inspection.precision import Loss, diagnose_precision, worst
from rmoe_megatron.inspection.watched_products import (
    ALL_RECIPES,
    DELAYED,
    SCALED_BY_OPERAND,
    WatchedProduct,
    products,
    watch_experts,
)
from rmoe_megatron.model.precision.rounding import NVFP4, RECIPES, DelayedScaling
from rmoe_megatron.model.recurrence.experts import Experts
from rmoe_megatron.model.transformer_config import transformer_config
from tests.support.commands import rmoe
from tests.support.configurations import HIDDEN, RECURRENCE, one_rank, randomise, tiny_config
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
    diagnose_precision(
        run_dir, tmp_path / "out", batches=1
    )  # and those before it, which are all samples there are
    assert files(run_dir) == before
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"precision.json", "precision.png"}


def test_an_output_that_cannot_be_written_is_said_at_once(run_dir: Path) -> None:
    code, errors = rmoe("diagnose", "precision", str(run_dir), "--out", "/dev/null/out")
    assert code == 2
    assert errors == (
        "error: --out /dev/null/out cannot be written: /dev/null is a file; choose another folder.\n"
    )


def test_settings_find_data_that_have_moved(run_dir: Path, tmp_path: Path) -> None:
    data = run_dir.parent / "data" / "train"
    moved = data.rename(tmp_path / "data")
    arguments = ["diagnose", "precision", str(run_dir), "--batches", "1", "--out", str(tmp_path / "out")]
    try:
        code, errors = rmoe(*arguments)
        assert (code, errors.count("\n")) == (2, 1)
        assert f"There is no shard folder {data}" in errors
        code, errors = rmoe(*arguments, f"data.train={moved}")
        assert code == 0, errors
    finally:
        moved.rename(data)


def test_how_a_run_was_trained_does_not_matter(run_dir: Path, tmp_path: Path) -> None:
    """Nothing of its engine, precision or layout has to be here."""
    trained_with = [
        "engine=deepspeed", "deepspeed.engine_options={unknown: 1}", "precision=fp8", "backend=transformer_engine",
        "training.compile=true", "parallel.context_parallel_size=3",
    ]  # fmt: skip
    diagnose_precision(run_dir, tmp_path, 1, trained_with)


@pytest.mark.parametrize("setting", ["model.hidden_size=64", "recurrence.steps=3", "recurrence=null"])
def test_weights_are_of_no_other_model(run_dir: Path, tmp_path: Path, setting: str) -> None:
    code, errors = rmoe("diagnose", "precision", str(run_dir), setting, "--out", str(tmp_path))
    assert (code, errors.count("\n")) == (2, 1)
    assert f"without overriding {setting.partition('.')[0].partition('=')[0]}" in errors


def test_several_ranks_are_refused(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="one process, but this job has 2 ranks"):
        diagnose_precision(run_dir, tmp_path, batches=1)


def test_imported_weights_have_no_data(run_dir: Path, tmp_path: Path) -> None:
    imported = shutil.copytree(run_dir, tmp_path / "imported")
    for checkpoint in (imported / "checkpoints").iterdir():
        (checkpoint / "manifest.json").unlink()
        (checkpoint / "run_state.json").write_text(json.dumps({"step": 0, "samples": 0, "imported": True}))
        write_manifest(checkpoint)
    with pytest.raises(UserError, match=f"{imported} holds imported weights"):
        diagnose_precision(imported, tmp_path / "out", batches=1)


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
    modules = {(block, f"recurrence.experts.{factor}") for block in (1, 2) for factor in ("down", "up")}
    assert set(ALL_RECIPES) == {"tensorwise", "delayed", "blockwise", "mxfp8", "nvfp4"}
    for recipe in ALL_RECIPES:
        measured = [each for each in found if each.recipe == recipe]
        rounded = expected if recipe == "delayed" else expected | modules
        assert {(each.block, each.layer) for each in measured} == rounded
        assert len(measured) == len(rounded)
        low, high = (0.01, 0.5) if recipe == "nvfp4" else (0.001, 0.15)
        for each in measured:
            assert low < each.output < high, each
            assert low < each.input_gradient < high, each
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


def relative(rounded: torch.Tensor, true: torch.Tensor) -> float:
    return ((rounded.double() - true).norm() / true.norm()).item()


def test_delayed_scaling_has_the_scales_of_the_batches_before() -> None:
    """What is larger than all that came before is cut to it; operands are cast to eight bits by PyTorch."""
    generator = torch.Generator().manual_seed(0)
    tokens, weight, gradient = (
        torch.randn(size, generator=generator).requires_grad_() for size in ((32, 48), (16, 48), (32, 16))
    )
    with one_rank(tiny_config()):
        product = WatchedProduct(DelayedScaling())
        for factor in (0.5, 0.125, 2):  # of a call's tokens and gradient
            product.measures = factor == 2
            output = (tokens * factor) @ weight.t()
            product.watch(tokens * factor, weight, output)
            output.backward(gradient * factor)
    assert {len(found) for found in product.errors.values()} == {1}

    def cast(values: torch.Tensor, amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        values, amax = values.detach().double(), amax.detach().double()
        scale = torch.finfo(dtype).max / amax
        return (values.clamp(-amax, amax) * scale).float().to(dtype).double() / scale

    x = cast(tokens * 2, tokens.abs().max() / 2, torch.float8_e4m3fn)
    w = cast(weight, weight.abs().max(), torch.float8_e4m3fn)
    g = cast(gradient * 2, gradient.abs().max() / 2, torch.float8_e5m2)
    true_x, true_w, true_g = (values.detach().double() for values in (tokens * 2, weight, gradient * 2))
    expected = (
        relative(x @ w.t(), true_x @ true_w.t()),
        relative(g @ w, true_g @ true_w),
        relative(g.t() @ x, true_g.t() @ true_x),
    )
    assert product.errors[DELAYED][0] == pytest.approx(expected, rel=1e-4)
    assert min(expected) > 0.2  # far more than of rounding


@pytest.mark.parametrize("rank", [4, None])
def test_modules_lose_what_each_loses_of_its_own_tokens(rank: int | None) -> None:
    counts = [3, 0, 8, 5]
    config, recurrence = tiny_config(), replace(RECURRENCE, rank=rank)
    with one_rank(config):
        groups = ProcessGroupCollection.use_mpu_process_groups()
        experts = Experts(transformer_config(config), recurrence, groups)
    randomise(experts)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(16, HIDDEN, generator=generator) * torch.logspace(-2, 2, 16).unsqueeze(1)
    gradient = torch.randn(16, 3 * HIDDEN, generator=generator) * torch.logspace(2, -2, 16).unsqueeze(1)
    inputs = (tokens.requires_grad_(), torch.tensor(counts), torch.ones(16))
    unwatched = experts(*inputs)
    watched = watch_experts(experts)
    for product in watched.values():
        product.measures = True
    output = experts(*inputs)
    assert torch.equal(output, unwatched)
    output.backward(gradient)
    parts = [
        operands_of_module(experts, module, *of_module)
        for module, of_module in enumerate(
            zip(tokens.detach().split(counts), gradient.split(counts), strict=True)
        )
        if len(of_module[0])
    ]
    assert watched.keys() == ({"weight"} if rank is None else {"down", "up"})
    for name, product in watched.items():
        assert product.errors.keys() == set(SCALED_BY_OPERAND)
        operands = [operand for part in parts for operand in part[name]]
        for recipe, rounding in SCALED_BY_OPERAND.items():
            found = [products(rounding, *each) for each in operands]
            exact = [
                (x.double() @ w.double().t(), g.double() @ w.double(), g.double().t() @ x.double())
                for x, w, g in operands
            ]
            expected = [
                relative(*(torch.cat([each[number].flatten() for each in of]) for of in (found, exact)))
                for number in range(3)
            ]
            assert product.errors[recipe] == [pytest.approx(expected, rel=1e-3)]


def operands_of_module(
    experts: Experts, module: int, tokens: torch.Tensor, gradient: torch.Tensor
) -> dict[str, list[tuple[torch.Tensor, ...]]]:
    """Return tokens, weight and gradient of a module's products by factor; those of ``up`` are three, of q, k and v."""
    if experts.rank is None:
        return {"weight": [(tokens, experts.weight[module].detach(), gradient)]}
    down, up = experts.down[module].detach(), experts.up[module].detach()
    reduced, of_outputs = (tokens @ down.t()).chunk(3, dim=-1), gradient.chunk(3, dim=-1)
    of_reduced = torch.cat([part @ factor for part, factor in zip(of_outputs, up, strict=True)], dim=-1)
    return {"down": [(tokens, down, of_reduced)], "up": list(zip(reduced, up, of_outputs, strict=True))}


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
