"""DiT's sampling protocol against its formulas in float64, and which models and samplers it takes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.imagenet.dit_sampling import (
    predict,
    published_sampler,
    require_class_conditional,
    sample,
)
from tests.hf.test_pipelines import recurrent_dit
from tests.support.sd3_pipeline import save_pipeline

SIDE, CHANNELS, CLASSES = 2, 4, 10
STEPS, GUIDANCE, LABELS, SEEDS = 5, 1.5, [3, 7], [11, 12]
MIX = torch.randn(CHANNELS, 2 * CHANNELS, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 4


def answer(latents: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
    """Noise and variance [B, 2 C, H, W] that depend on everything a model sees."""
    mixed = torch.einsum("bchw,cd->bdhw", latents, MIX.to(latents))
    shift = torch.sin(timestep / 100 + labels).to(latents).view(-1, 1, 1, 1)
    return torch.tanh(mixed + 0.3 * shift)


class Transformer:
    config = SimpleNamespace(
        in_channels=CHANNELS, out_channels=2 * CHANNELS, sample_size=SIDE, num_embeds_ada_norm=CLASSES
    )
    device, dtype = torch.device("cpu"), torch.float32

    def __call__(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        return (answer(hidden_states, timestep, class_labels),)


class Decoder:
    config = SimpleNamespace(scaling_factor=0.5, shift_factor=None)
    dtype = torch.float32

    def decode(self, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
        self.seen = latents
        return (latents[:, :3] / 4,)


def by_the_formulas(interval: tuple[float, float]) -> Tensor:
    """Ancestral sampling of Nichol and Dhariwal (2021) over evenly spaced timesteps, in float64."""
    betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    cumulative = torch.cumprod(1 - betas, 0)
    timesteps = [round(number * 999 / (STEPS - 1)) for number in range(STEPS)][::-1]
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]

    def draw() -> Tensor:
        drawn = [torch.randn(1, CHANNELS, SIDE, SIDE, generator=each) for each in generators]
        return torch.cat(drawn).double()

    labels, null = torch.tensor(LABELS), torch.full((2,), CLASSES)
    noisy = draw()
    for number, timestep in enumerate(timesteps):
        times = torch.full((2,), float(timestep), dtype=torch.float64)
        output = answer(noisy, times, labels)
        if interval[0] <= timestep / 1000 <= interval[1]:
            free = answer(noisy, times, null)
            # Three of four channels; the fourth and the variance stay those of the class.
            output[:, :3] = free[:, :3] + GUIDANCE * (output[:, :3] - free[:, :3])
        noise, variance = output.chunk(2, dim=1)
        now = cumulative[timestep]
        before = cumulative[timesteps[number + 1]] if number + 1 < STEPS else torch.tensor(1.0).double()
        beta = 1 - now / before
        clean = (noisy - (1 - now).sqrt() * noise) / now.sqrt()
        mean = (
            before.sqrt() * beta / (1 - now) * clean
            + (now / before).sqrt() * (1 - before) / (1 - now) * noisy
        )
        if timestep == 0:
            return mean
        share = (variance + 1) / 2
        smallest = (1 - before) / (1 - now) * beta
        log_variance = share * beta.log() + (1 - share) * smallest.log()
        noisy = mean + (0.5 * log_variance).exp() * draw()
    raise AssertionError


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.8)])
def test_the_samples_are_those_of_the_formulas(tmp_path: Path, interval: tuple[float, float]) -> None:
    recurrent_dit(tmp_path)
    pipeline = SimpleNamespace(
        transformer=Transformer(), vae=Decoder(), scheduler=published_sampler(tmp_path, None)
    )
    images = sample(pipeline, LABELS, SEEDS, STEPS, GUIDANCE, interval)
    expected = by_the_formulas(interval)
    torch.testing.assert_close(pipeline.vae.seen.double(), expected / 0.5, rtol=1e-4, atol=1e-5)
    pixels = (127.5 * (expected[:, :3] / 2) + 128).clamp(0, 255).floor().permute(0, 2, 3, 1).numpy()
    assert np.abs(images - pixels).max() <= 1
    assert (images != pixels).mean() < 0.1  # where a float32 falls on the other side of a whole number
    one = sample(pipeline, LABELS[1:], SEEDS[1:], STEPS, GUIDANCE, interval)
    assert np.abs(one[0].astype(int) - images[1]).max() <= 1  # alone as in a batch


def test_guidance_moves_three_channels() -> None:
    latents = torch.randn(2, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    times, labels = torch.tensor(500.0), torch.tensor(LABELS)
    plain, guided = (predict(Transformer(), latents, times, labels, scale) for scale in (1.0, 4.0))
    changed = (plain != guided).flatten(2).any(dim=2).all(dim=0)
    assert changed.tolist() == [True] * 3 + [False] * 5


def test_a_picture_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    recurrent_dit(tmp_path)
    decoder: Any = SimpleNamespace(
        config=Decoder.config,
        dtype=torch.float32,
        decode=lambda latents, return_dict: (latents * float("nan"),),
    )
    pipeline = SimpleNamespace(
        transformer=Transformer(), vae=decoder, scheduler=published_sampler(tmp_path, None)
    )
    with pytest.raises(UserError, match="not finite"):
        sample(pipeline, LABELS, SEEDS, 2, GUIDANCE)


def test_which_models_it_takes(tmp_path: Path) -> None:
    recurrent_dit(tmp_path / "dit")
    save_pipeline(tmp_path / "sd3")
    assert require_class_conditional(tmp_path / "dit") == 1000
    with pytest.raises(UserError, match="draws captions, not classes"):
        require_class_conditional(tmp_path / "sd3")
    with pytest.raises(UserError, match="not a diffusers folder"):
        require_class_conditional(tmp_path)
    sampler = published_sampler(tmp_path / "dit", None)
    assert isinstance(sampler, DDPMScheduler)
    assert sampler.config.variance_type == "learned_range"
    assert not sampler.config.clip_sample
    assert isinstance(published_sampler(tmp_path / "dit", "ddim"), DDIMScheduler)
