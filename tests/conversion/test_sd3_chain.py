"""A user's way with Stable Diffusion 3: import, precompute, fine-tune the frozen base, export, sample."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

import rmoe_megatron.hf  # noqa: F401  # diffusers loads the recurrent transformer from it
from tests.support.commands import rmoe
from tests.support.runs import assert_same_picture, losses, write_shard
from tests.support.sd3_pipeline import T5_WIDTH, TEXT_LENGTH, save_pipeline

CONFIG = f"""\
run_dir: {{folder}}/run
device: cpu
model: {{{{sample_size: 8, patch_size: 2, in_channels: 4, num_layers: 3, hidden_size: 32, num_attention_heads: 2,
         qk_norm: false, text_length: {TEXT_LENGTH}, text_hidden_size: {T5_WIDTH}, pooled_size: 28,
         pos_embed_max_size: 6}}}}
recurrence: {{{{layers: [1, 2], num_modules: 2, steps: 2, rank: 4}}}}
fine_tuning: {{{{base: {{folder}}/base}}}}
encoders: {{{{text_encoder: {{folder}}/sd3, autoencoder: {{folder}}/sd3}}}}
diffusion: {{{{shift: 3.0}}}}
data: {{{{train: {{folder}}/encoded/train}}}}
optimizer: {{{{learning_rate: 1.0e-2}}}}
training: {{{{steps: 4, micro_batch_size: 4, global_batch_size: 4, log_every: 1, sample_prompts: [a cat],
            sample_steps: 2}}}}
"""


def test_sd3_from_import_to_images(tmp_path: Path) -> None:
    base = save_pipeline(tmp_path / "sd3")
    rng = np.random.default_rng(0)
    samples = []
    for caption in ("a cat", "two red circles") * 4:
        picture = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(picture, format="png")
        samples.append({"png": picture.getvalue(), "txt": caption.encode()})
    write_shard(tmp_path / "images" / "train" / "images-000000.tar", samples)
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(folder=tmp_path))
    length = ["--text-length", str(TEXT_LENGTH)]
    commands = [
        ["convert", "from-hf", str(tmp_path / "sd3"), str(tmp_path / "base"), *length],
        ["data", "precompute", str(config), str(tmp_path / "images"), str(tmp_path / "encoded")],
        ["train", str(config)],
        ["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "model")],
        [
            "sample",
            str(tmp_path / "model"),
            "--prompt",
            "a cat",
            "--steps",
            "2",
            "--dtype",
            "fp32",
            "--out",
            str(tmp_path / "out"),
        ],
    ]
    for command in commands:
        code, errors = rmoe(*command)
        assert code == 0, errors
    assert len(losses(tmp_path / "run")) == 4
    assert Image.open(tmp_path / "out" / "00000.png").size == (16, 16)
    assert_same_picture(tmp_path / "run" / "samples" / "step-00000004.png", tmp_path / "out" / "grid.png")
    described = json.loads((tmp_path / "encoded" / "dataset.json").read_text())["encoders"]
    assert len(described["text_encoder_sha256"]) == 64
    tuned = StableDiffusion3Pipeline.from_pretrained(tmp_path / "model")
    assert type(tuned.transformer).__name__ == "RecurrentSD3Transformer2DModel"
    for name, value in base.transformer.state_dict().items():
        assert torch.equal(tuned.transformer.state_dict()[name], value), name
    up = [value for name, value in tuned.transformer.named_parameters() if name.endswith("experts.up.weight")]
    assert len(up) == 2
    assert all(value.abs().sum() > 0 for value in up)
