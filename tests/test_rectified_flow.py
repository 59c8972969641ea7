"""The training objective against its closed forms and against diffusers' sampler."""

import math

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy import stats

from rmoe_megatron.config.schema import DiffusionConfig
from rmoe_megatron.counter_rng import sample_keys
from rmoe_megatron.diffusion.rectified_flow import TIMESTEPS, add_noise, drop_captions, sample_sigma


def test_sigma_is_logit_normal() -> None:
    config = DiffusionConfig(logit_mean=0.3, logit_std=0.8)
    sigma = sample_sigma(config, sample_keys(0, torch.arange(20000))).double()
    assert stats.kstest(torch.logit(sigma).numpy(), stats.norm(0.3, 0.8).cdf).pvalue > 1e-3


def test_shift_adds_its_logarithm_to_the_logit() -> None:
    keys = sample_keys(0, torch.arange(100))
    plain = sample_sigma(DiffusionConfig(), keys)
    shifted = sample_sigma(DiffusionConfig(shift=3.0), keys)
    torch.testing.assert_close(torch.logit(shifted), torch.logit(plain) + math.log(3.0), rtol=1e-4, atol=1e-4)


def test_one_euler_step_with_the_target_returns_the_data() -> None:
    latents = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    example = add_noise(DiffusionConfig(), latents, sample_keys(0, torch.arange(4)))
    for index in range(4):
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[(example.timestep[index] / TIMESTEPS).item()])
        step = scheduler.step(example.target[index], scheduler.timesteps[0], example.noisy_latents[index])
        torch.testing.assert_close(step.prev_sample, latents[index], rtol=1e-4, atol=1e-4)


def test_captions_are_dropped_at_the_configured_rate() -> None:
    count = 20000
    hidden, pooled = torch.ones(count, 2, 3), torch.ones(count, 4)
    null = (torch.zeros(1, 2, 3), torch.zeros(1, 4))
    config = DiffusionConfig(guidance_dropout=0.25)
    dropped_hidden, dropped_pooled = drop_captions(
        config, hidden, pooled, null, sample_keys(0, torch.arange(count))
    )
    kept = dropped_pooled[:, 0]
    assert torch.equal(dropped_hidden[:, 0, 0], kept)
    assert stats.binomtest(int((kept == 0).sum()), count, 0.25).pvalue > 1e-3
