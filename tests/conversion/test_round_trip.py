"""A run as a folder and back: what training knew is said, read back, or refused by name; images are those of the training model."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, FlowMatchEulerDiscreteScheduler

from rmoe_megatron.checkpoint.weights import RunWeights
from rmoe_megatron.config.buckets import Bucket
from rmoe_megatron.config.model import (
    Architecture,
    DiffusionConfig,
    EncodersConfig,
    ModelConfig,
    ModelDescription,
    Objective,
    Prediction,
    RecurrenceConfig,
)
from rmoe_megatron.config.run import ParallelConfig, RunConfig, StageConfig, TrainingConfig
from rmoe_megatron.conversion.export import at_stage_of, export_run
from rmoe_megatron.conversion.importing import import_diffusers
from rmoe_megatron.diffusion.rectified_flow import resolution_shift
from rmoe_megatron.errors import UserError
from rmoe_megatron.inference.sampling import load_pipeline, sample_images
from tests.support.configurations import tiny_config
from tests.support.diffusers_models import make_model
from tests.support.runs import save_untrained
from tests.support.sd3_pipeline import T5_WIDTH, TEXT_LENGTH, make_pipeline, save_pipeline

MMDIT = ModelConfig(
    sample_size=8, patch_size=2, in_channels=4, num_layers=3, hidden_size=32, num_attention_heads=2, qk_norm=False,
    text_length=TEXT_LENGTH, text_hidden_size=T5_WIDTH, pooled_size=28, pos_embed_max_size=6,
)  # fmt: skip
MINILM = replace(MMDIT, in_channels=3, text_length=9, text_hidden_size=384, pooled_size=384)
DIT = ModelConfig(
    architecture=Architecture.dit, sample_size=8, patch_size=2, in_channels=4, num_layers=3, hidden_size=32,
    num_attention_heads=2, qk_norm=False, num_classes=7,
)  # fmt: skip
RECURRENCE = RecurrenceConfig(layers=[1], num_modules=2, steps=2, rank=4, up_init_std=0.1)
FLOW = DiffusionConfig(shift=3.0)
BY_SIZE = DiffusionConfig(shift=3.0, shift_base_size=16)
DDPM = DiffusionConfig(objective=Objective.ddpm)
SD3, PLAIN = EncodersConfig(text_encoder="sd3", autoencoder="sd3"), EncodersConfig(autoencoder="sd3")

DESCRIPTIONS: dict[str, ModelDescription] = {
    "sd3": ModelDescription(MMDIT, None, None, None, FLOW, SD3),
    "sd3 as published": ModelDescription(replace(MMDIT, text_length=333), None, None, None, FLOW, SD3),
    "sd3 without CLIP-L": ModelDescription(MMDIT, None, None, None, FLOW, replace(SD3, dropped=["clip_l"])),
    "sd3 without CLIP-G and T5": ModelDescription(
        MMDIT, RECURRENCE, None, None, BY_SIZE, replace(SD3, dropped=["clip_g", "t5"])
    ),
    "sd3 by size": ModelDescription(MMDIT, RECURRENCE, None, None, BY_SIZE, SD3),
    "sd3 of pixels": ModelDescription(
        replace(MMDIT, in_channels=3), None, None, None, FLOW, replace(SD3, autoencoder="pixel")
    ),
    "sd3 with an older autoencoder": ModelDescription(
        MMDIT, None, None, None, FLOW, replace(SD3, autoencoder="unshifted")
    ),
    "minilm": ModelDescription(MINILM, RECURRENCE, None, None, BY_SIZE, EncodersConfig()),
    "minilm, samples": ModelDescription(
        MINILM, None, None, None, replace(FLOW, prediction=Prediction.sample), EncodersConfig()
    ),
    "minilm, ddpm": ModelDescription(replace(MINILM, in_channels=4), None, None, None, DDPM, PLAIN),
    "dit": ModelDescription(replace(DIT, learned_sigma=True), None, None, None, DDPM, PLAIN),
    "dit, flow": ModelDescription(DIT, RECURRENCE, None, None, BY_SIZE, PLAIN),
    "dit of pixels": ModelDescription(replace(DIT, in_channels=3), None, None, None, FLOW, EncodersConfig()),
}


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders") / "sd3"
    save_pipeline(folder)
    return folder


def run_of(description: ModelDescription, sd3: Path, folder: Path, **changes: Any) -> RunConfig:
    """Save a run of random weights."""
    encoders = replace(
        description.encoders,
        **{
            key: str(sd3)
            for key in ("text_encoder", "autoencoder")
            if getattr(description.encoders, key) == "sd3"
        },
    )
    config = tiny_config(
        description.recurrence,
        run_dir=str(folder),
        model=description.model,
        diffusion=description.diffusion,
        encoders=encoders,
        **changes,
    )
    save_untrained(config, folder)
    return config


def images(folder: Path, config: ModelDescription) -> np.ndarray:
    prompts = ["3", "5"] if config.model.is_class_conditional else ["a cat", "two red circles"]
    return sample_images(load_pipeline(folder), prompts, [0, 1], 3, 2.0, 2).astype(int)


@pytest.mark.parametrize("name", ["sd3 by size", "minilm", "dit, flow"])
def test_the_sampler_is_that_of_the_size(name: str, sd3: Path, tmp_path: Path) -> None:
    config = run_of(DESCRIPTIONS[name], sd3, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    pipeline = load_pipeline(tmp_path / "out")
    prompt = "3" if config.model.is_class_conditional else "a cat"
    unit = pipeline.vae_scale_factor
    sizes = [(8, 8), (8, 8)] if config.model.is_class_conditional else [(8, 8), (12, 12), (4, 12), (8, 8)]
    for height, width in sizes:
        size = None if config.model.is_class_conditional else Bucket(width * unit, height * unit)
        sample_images(pipeline, [prompt], [0], 4, 1.0, 1, size=size)
        shift = 3.0 * (height * width) ** 0.5 / 16
        assert resolution_shift(config.diffusion, height, width) == pytest.approx(shift)
        expected = FlowMatchEulerDiscreteScheduler(shift=shift)
        expected.set_timesteps(4)
        torch.testing.assert_close(pipeline.scheduler.sigmas, expected.sigmas)


def test_a_run_in_stages_makes_images_of_its_stage(sd3: Path, tmp_path: Path) -> None:
    stages = [StageConfig(steps=2, sample_size=8), StageConfig(steps=3, sample_size=12)]
    training = TrainingConfig(steps=5, micro_batch_size=4, global_batch_size=8, stages=stages)
    config = run_of(DESCRIPTIONS["sd3 by size"], sd3, tmp_path / "run", training=training)
    assert [at_stage_of(config, step).model.sample_size for step in (0, 1, 2, 3, 5)] == [8, 8, 8, 12, 12]
    save_untrained(config, tmp_path / "later", step=5)
    export_run(tmp_path / "later", tmp_path / "out")
    made = images(tmp_path / "out", config)
    assert made.shape[1:3] == (24, 24)
    import_diffusers(tmp_path / "out", tmp_path / "again", None, ParallelConfig())
    export_run(tmp_path / "again", tmp_path / "out-again")
    assert (images(tmp_path / "out-again", config) == made).all()


def test_the_text_length_of_a_folder_is_taken_and_another_refused(sd3: Path, tmp_path: Path) -> None:
    run_of(DESCRIPTIONS["minilm"], sd3, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    with pytest.raises(
        UserError, match="--text-length 16 is not that of .*, whose model has 9 text tokens; leave it out"
    ):
        import_diffusers(tmp_path / "out", tmp_path / "again", 16, ParallelConfig())
    import_diffusers(tmp_path / "out", tmp_path / "again", 9, ParallelConfig())
    import_diffusers(sd3, tmp_path / "stock", None, ParallelConfig())
    assert RunWeights(tmp_path / "stock").config.model.text_length == 333


@pytest.mark.parametrize(
    "settings",
    [
        {"prediction_type": "v_prediction"}, {"beta_schedule": "scaled_linear"}, {"beta_end": 0.012}, {"num_train_timesteps": 500},
        {"rescale_betas_zero_snr": True},
    ],
)  # fmt: skip
def test_a_sampler_of_another_model_is_refused_by_name(settings: dict[str, Any], tmp_path: Path) -> None:
    vae: AutoencoderKL = make_pipeline(shift_factor=0.0).vae
    scheduler = DDIMScheduler(clip_sample=False, **settings)
    DiTPipeline(transformer=make_model("dit"), vae=vae, scheduler=scheduler).save_pretrained(tmp_path / "dit")
    (key,) = settings
    with pytest.raises(UserError, match=f"scheduler has {key} "):
        import_diffusers(tmp_path / "dit", tmp_path / "run", None, ParallelConfig())
    assert not (tmp_path / "run").exists()


def test_dynamic_shifting_is_refused(tmp_path: Path) -> None:
    save_pipeline(tmp_path / "sd3")
    path = tmp_path / "sd3" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dynamic_shifting": True}))
    with pytest.raises(UserError, match="scheduler has use_dynamic_shifting true"):
        import_diffusers(tmp_path / "sd3", tmp_path / "run", None, ParallelConfig())


def test_another_least_sigma_of_a_predicted_sample_is_refused(sd3: Path, tmp_path: Path) -> None:
    run_of(DESCRIPTIONS["minilm, samples"], sd3, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    path = tmp_path / "out" / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"min_sigma": 0.1}))
    with pytest.raises(UserError, match=r"has min_sigma 0.1; supported are null and 0.05"):
        import_diffusers(tmp_path / "out", tmp_path / "again", None, ParallelConfig())


def test_what_of_a_sampler_is_lost_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vae: AutoencoderKL = make_pipeline(shift_factor=0.0).vae
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    DiTPipeline(transformer=make_model("dit"), vae=vae, scheduler=scheduler).save_pretrained(tmp_path / "dit")
    with caplog.at_level(logging.WARNING):
        import_diffusers(tmp_path / "dit", tmp_path / "run", None, ParallelConfig())
    assert 'no place for the sampler\'s timestep_spacing="trailing"' in caplog.text


def test_the_page_of_an_export_says_what_was_resolved(sd3: Path, tmp_path: Path) -> None:
    run_of(DESCRIPTIONS["sd3 without CLIP-L"], sd3, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out", dtype=torch.bfloat16)
    page = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "| pipeline | `TunedSD3Pipeline` |", "moving averages, bfloat16", "precision fp32, seed 0", f"without clip_l, {TEXT_LENGTH} tokens",
        "| images | 16 x 16 pixels", "| shift of sigma | 3 |", f"torch {torch.__version__.partition('+')[0]}",
    ):  # fmt: skip
        assert words in page, page
    assert str(tmp_path) not in page
