"""Rectified flow against its closed forms and against diffusers' training code and sampler."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from scipy import stats

from rmoe_megatron.config.model import DiffusionConfig, TimestepDensity
from rmoe_megatron.counter_rng import sample_keys
from rmoe_megatron.data.batch import ClassConditions, TextConditions
from rmoe_megatron.diffusion.guidance import drop_conditions
from rmoe_megatron.diffusion.rectified_flow import TIMESTEPS, RectifiedFlow, draw_sigma, resolution_shift


def test_sigma_is_logit_normal() -> None:
    config = DiffusionConfig(logit_mean=0.3, logit_std=0.8)
    sigma = draw_sigma(config, sample_keys(0, torch.arange(20000))).double()
    assert stats.kstest(torch.logit(sigma).numpy(), stats.norm(0.3, 0.8).cdf).pvalue > 1e-3


@pytest.mark.parametrize("scale", [-0.5, 0.81, 1.29])
def test_mode_density_is_that_of_diffusers(scale: float) -> None:
    config = DiffusionConfig(timestep_density=TimestepDensity.mode, mode_scale=scale)
    ours = draw_sigma(config, sample_keys(0, torch.arange(20000)))
    theirs = compute_density_for_timestep_sampling(
        "mode", 20000, mode_scale=scale, generator=torch.Generator().manual_seed(0)
    )
    assert ours.min() >= 0
    assert ours.max() <= 1
    assert stats.ks_2samp(ours.numpy(), theirs.numpy()).pvalue > 1e-3


def test_cosmap_density_is_the_weighting_of_diffusers() -> None:
    """diffusers weights the loss of uniform timesteps by the density that SD3's paper draws from."""
    config = DiffusionConfig(timestep_density=TimestepDensity.cosmap)
    sigma = draw_sigma(config, sample_keys(0, torch.arange(20000))).double().numpy()
    grid = torch.linspace(0, 1, 10001, dtype=torch.float64)
    density = compute_loss_weighting_for_sd3("cosmap", grid)
    cumulative = torch.cat((torch.zeros(1), torch.cumulative_trapezoid(density, grid))).numpy()
    assert cumulative[-1] == pytest.approx(1, abs=1e-6)

    def distribution(values: np.ndarray) -> np.ndarray:
        return np.interp(values, grid.numpy(), cumulative)

    assert stats.kstest(sigma, distribution).pvalue > 1e-3


def test_uniform_density() -> None:
    config = DiffusionConfig(timestep_density=TimestepDensity.uniform)
    sigma = draw_sigma(config, sample_keys(0, torch.arange(20000))).double()
    assert stats.kstest(sigma.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("values", [1, 2, 7])
def test_timestep_and_noise_know_nothing_of_each_other(values: int) -> None:
    """Neither the noise of a sample nor its size tells anything of the sample's timestep."""
    config = DiffusionConfig(timestep_density=TimestepDensity.uniform)
    example = RectifiedFlow(config).add_noise(
        torch.zeros(20_000, 1, 1, values), sample_keys(3, torch.arange(20_000))
    )
    noise, sigma = example.target.flatten(1).double(), example.timestep.double()
    seen = [*noise.T, *noise.abs().T, noise.norm(dim=1)]
    seen += [noise[:, 0] / noise[:, -1]] if values > 1 else []
    assert all(stats.spearmanr(each, sigma).pvalue > 1e-4 for each in seen)


def sigma_of(config: DiffusionConfig, sample_size: int = 8) -> torch.Tensor:
    latents = torch.zeros(100, 1, sample_size, sample_size)
    example = RectifiedFlow(config).add_noise(latents, sample_keys(0, torch.arange(100)))
    return example.timestep / TIMESTEPS


def test_shift_adds_its_logarithm_to_the_logit() -> None:
    plain, shifted = sigma_of(DiffusionConfig()), sigma_of(DiffusionConfig(shift=3.0))
    torch.testing.assert_close(torch.logit(shifted), torch.logit(plain) + math.log(3.0), rtol=1e-4, atol=1e-4)


def test_shift_grows_with_the_square_root_of_the_number_of_tokens() -> None:
    config = DiffusionConfig(shift=1.5, shift_base_size=64)
    assert resolution_shift(config, 128, 128) == pytest.approx(1.5 * math.sqrt(128**2 / 64**2))
    assert resolution_shift(config, 64, 64) == 1.5
    assert resolution_shift(config, 32, 128) == 1.5  # as many tokens
    torch.testing.assert_close(sigma_of(config, 128), sigma_of(DiffusionConfig(shift=3.0)))


def test_one_euler_step_with_the_target_returns_the_data() -> None:
    latents = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    objective = RectifiedFlow(DiffusionConfig())
    example = objective.add_noise(latents, sample_keys(0, torch.arange(4)))
    assert objective.loss(example.target, example) == 0
    for index in range(4):
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[(example.timestep[index] / TIMESTEPS).item()])
        step = scheduler.step(example.target[index], scheduler.timesteps[0], example.noisy_latents[index])
        torch.testing.assert_close(step.prev_sample, latents[index], rtol=1e-4, atol=1e-4)


def test_conditions_are_dropped_at_the_configured_rate() -> None:
    count = 20000
    conditions = TextConditions(torch.ones(count, 2, 3), torch.ones(count, 1))
    null = TextConditions(torch.zeros(1, 2, 3), torch.zeros(1, 1))
    config = DiffusionConfig(guidance_dropout=0.25)
    dropped = drop_conditions(config, conditions, null, sample_keys(0, torch.arange(count)))
    kept = dropped.text_pooled
    assert torch.equal(dropped.text_hidden_states, kept.view(-1, 1, 1).expand(-1, 2, 3))
    labels = ClassConditions(torch.ones(count, dtype=torch.int64))
    classes = drop_conditions(
        config, labels, ClassConditions(torch.tensor([9])), sample_keys(0, torch.arange(count))
    )
    assert torch.equal(classes.class_labels == 9, kept[:, 0] == 0)
    assert stats.binomtest(int((kept == 0).sum()), count, 0.25).pvalue > 1e-3
