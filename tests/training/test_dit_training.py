"""A class-conditional DiT from shards to images: DDPM with learned variance, one rank and two."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.commands import rmoe
from tests.support.runs import array, assert_same_picture, losses, write_shard

CONFIG = """\
run_dir: {folder}/run
device: cpu
model: {{architecture: dit, sample_size: 8, patch_size: 2, in_channels: 3, num_layers: 3, hidden_size: 32,
         num_attention_heads: 2, qk_norm: false, num_classes: 7, learned_sigma: true}}
recurrence: {{layers: [1, 2], num_modules: 4, steps: 2, rank: 4, up_init_std: 0.1, aux_loss_coeff: 0.01}}
diffusion: {{objective: ddpm, min_snr_gamma: 5.0}}
data: {{train: {folder}/data/train, validation: {folder}/data/val}}
optimizer: {{learning_rate: 1.0e-3, warmup_steps: 2, ema_decay: 0.9, ema_power: 0.75}}
training: {{steps: 10, micro_batch_size: 4, global_batch_size: 8, log_every: 1, validate_every: 10,
            validation_samples: 16, sample_every: 10, sample_steps: 2, sample_prompts: ["0", "6"]}}
checkpoint: {{every: 5}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dit")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        samples = [
            {"latents.npy": array(rng.standard_normal((3, 8, 8))), "cls": str(rng.integers(7)).encode()}
            for _ in range(24)
        ]
        write_shard(folder / "data" / split / "images-000000.tar", samples)
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder))
    code, errors = rmoe("train", str(folder / "config.yaml"))
    assert code == 0, errors
    return folder


def test_it_trains_validates_and_draws(folder: Path) -> None:
    assert len(set(losses(folder / "run").values())) == 10
    assert np.isfinite(losses(folder / "run", "validation_loss")[10])
    assert Image.open(folder / "run" / "samples" / "step-00000010.png").size[0] > 100


def test_two_ranks_give_the_losses_of_one(folder: Path) -> None:
    overrides = [f"run_dir={folder}/two", "parallel.expert_model_parallel_size=2"]
    code, errors = rmoe("train", str(folder / "config.yaml"), *overrides, ranks=2)
    assert code == 0, errors
    assert losses(folder / "two") == pytest.approx(losses(folder / "run"), abs=1e-4)


def test_it_is_exported_and_sampled_by_label(folder: Path) -> None:
    code, errors = rmoe("convert", "to-hf", str(folder / "run"), str(folder / "model"))
    assert code == 0, errors
    index = json.loads((folder / "model" / "model_index.json").read_text())
    assert index["_class_name"] == "RecurrentDiTPipeline"
    arguments = ["--prompt", "3", "--prompt", "6", "--steps", "2", "--scheduler", "dpm"]
    interval = ["--guidance-interval", "0.2", "0.9"]
    code, errors = rmoe(
        "sample", str(folder / "model"), *arguments, *interval, "--out", str(folder / "samples")
    )
    assert code == 0, errors
    assert Image.open(folder / "samples" / "00001.png").size == (8, 8)
    as_in_training = ["--prompt", "0", "--prompt", "6", "--steps", "2", "--dtype", "fp32"]
    code, errors = rmoe("sample", str(folder / "model"), *as_in_training, "--out", str(folder / "grid"))
    assert code == 0, errors
    assert_same_picture(folder / "run" / "samples" / "step-00000010.png", folder / "grid" / "grid.png")
    code, errors = rmoe("sample", str(folder / "model"), "--prompt", "7", "--out", str(folder / "samples"))
    assert code == 2
    assert "no class label" in errors
    assert "Traceback" not in errors


def test_labels_outside_the_model_are_named(folder: Path) -> None:
    overrides = [f"run_dir={folder}/few", "model.num_classes=2", 'training.sample_prompts=["0"]']
    code, errors = rmoe("train", str(folder / "config.yaml"), *overrides)
    assert code == 2
    assert "num_classes is 2" in errors
    assert "Traceback" not in errors


def test_its_layers_are_measured_in_low_precision(folder: Path) -> None:
    code, errors = rmoe(
        "diagnose", "precision", str(folder / "run"), "--batches", "1", "--out", str(folder / "precision")
    )
    assert code == 0, errors
    found = json.loads((folder / "precision" / "precision.json").read_text())
    layers = {"attention.linear_qkv", "attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"}
    assert {(each["block"], each["layer"]) for each in found} == {
        (block, layer) for block in range(3) for layer in layers
    } | {(block, f"recurrence.experts.{factor}") for block in (1, 2) for factor in ("down", "up")}
