"""DDPM's loss and schedule against diffusers' scheduler, torch.distributions and formulas in float64."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from scipy import stats
from torch.distributions import Normal, kl_divergence

from rmoe_megatron.config.model import DiffusionConfig, Objective
from rmoe_megatron.counter_rng import sample_keys
from rmoe_megatron.diffusion.ddpm import DDPM, discretised_log_likelihood
from rmoe_megatron.diffusion.objective import NoisedLatents

CONFIG = DiffusionConfig(objective=Objective.ddpm)
CPU = torch.device("cpu")


def scheduler() -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=2e-2, clip_sample=False)


def example_at(timestep: int, seed: int = 0) -> NoisedLatents:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.rand(3, 2, 4, 4, generator=generator) * 2 - 1
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.full((3,), timestep)
    noisy = scheduler().add_noise(latents, noise, timesteps)
    return NoisedLatents(noisy, timesteps.float(), noise, latents)


def test_noise_is_added_as_in_diffusers() -> None:
    latents = torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    example = DDPM(CONFIG, CPU).add_noise(latents, sample_keys(0, torch.arange(64)))
    expected = scheduler().add_noise(latents, example.target, example.timestep.long())
    torch.testing.assert_close(example.noisy_latents, expected, rtol=1e-5, atol=1e-5)
    assert stats.kstest(example.target.flatten().numpy(), "norm").pvalue > 1e-3


def test_timesteps_are_uniform() -> None:
    example = DDPM(CONFIG, CPU).add_noise(torch.zeros(50000, 1, 1, 1), sample_keys(0, torch.arange(50000)))
    counts = torch.bincount(example.timestep.long(), minlength=1000)
    assert counts.numel() == 1000
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_without_learned_variance_the_loss_is_the_noises_error() -> None:
    example = example_at(500)
    output = torch.randn(example.target.shape, generator=torch.Generator().manual_seed(1))
    expected = ((output.double() - example.target.double()) ** 2).mean()
    assert DDPM(CONFIG, CPU).loss(output, example).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("timestep", [1, 2, 300, 999])
def test_learned_variance_adds_the_divergence_from_the_posterior(timestep: int) -> None:
    """Mean squared error plus KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in bits per dimension."""
    example = example_at(timestep)
    generator = torch.Generator().manual_seed(1)
    noise, variance = (torch.randn(example.target.shape, generator=generator).double() for _ in range(2))
    betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    alphas = 1 - betas
    products = alphas.cumprod(0)
    beta, alpha = betas[timestep], alphas[timestep]
    product, previous = products[timestep], products[timestep - 1]
    posterior_variance = (1 - previous) / (1 - product) * beta

    def posterior_mean(sample: torch.Tensor) -> torch.Tensor:
        noisy = example.noisy_latents.double()
        return (previous.sqrt() * beta * sample + alpha.sqrt() * (1 - previous) * noisy) / (1 - product)

    predicted = (example.noisy_latents.double() - (1 - product).sqrt() * noise) / product.sqrt()
    weight = (variance + 1) / 2
    deviation = (0.5 * (weight * beta.log() + (1 - weight) * posterior_variance.log())).exp()
    divergence = kl_divergence(
        Normal(posterior_mean(example.latents.double()), posterior_variance.sqrt()),
        Normal(posterior_mean(predicted), deviation),
    )
    error = (noise - example.target.double()) ** 2
    expected = error.mean() + divergence.mean() / math.log(2)
    output = torch.cat((noise, variance), dim=1).float()
    assert DDPM(CONFIG, CPU).loss(output, example).item() == pytest.approx(expected.item(), rel=1e-4)


def test_posterior_equals_diffusers_sampler() -> None:
    """The bound's mean and lowest variance are those of diffusers' ancestral step."""
    objective = DDPM(CONFIG, CPU)
    theirs = DDPMScheduler(
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=2e-2,
        clip_sample=False,
        variance_type="fixed_small_log",
    )
    assert objective.posterior_log_variance[400].exp().item() == pytest.approx(
        theirs._get_variance(400).item() ** 2, rel=1e-4
    )


def test_the_last_step_is_the_likelihood_of_a_pixel() -> None:
    """Bins of width 2/255 under a normal distribution; the exact distribution function in float64 as reference."""
    value = (torch.randint(0, 256, (1000,), generator=torch.Generator().manual_seed(0)).double() / 127.5) - 1
    mean, log_scale = value + 0.02, torch.full_like(value, math.log(0.05))
    normal = Normal(mean, log_scale.exp())
    upper = torch.where(value > 0.999, 1.0, normal.cdf(value + 1 / 255))
    lower = torch.where(value < -0.999, 0.0, normal.cdf(value - 1 / 255))
    expected = (upper - lower).log()
    actual = discretised_log_likelihood(value.float(), mean.float(), log_scale.float())
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=5e-3)
    example = example_at(0)
    perfect = torch.cat((example.target, -torch.ones_like(example.target)), dim=1)
    betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)[:2]
    deviation = (betas[1] * betas[0] / (1 - (1 - betas).prod())).sqrt()  # the posterior's of the step before
    bits = -(2 * Normal(0.0, deviation).cdf(torch.tensor(1 / 255)) - 1).log2()
    assert DDPM(CONFIG, CPU).loss(perfect, example).item() == pytest.approx(bits.item(), rel=1e-2)


def test_the_bound_gives_the_noise_no_gradient() -> None:
    example = example_at(300)
    output = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(2), requires_grad=True)
    DDPM(CONFIG, CPU).loss(output, example).backward()
    noise, variance = output.grad.chunk(2, dim=1)
    expected = 2 * (output.detach()[:, :2] - example.target) / example.target.numel()
    torch.testing.assert_close(noise, expected)
    assert variance.abs().sum() > 0


def test_min_snr_weights() -> None:
    config = replace(CONFIG, min_snr_gamma=5.0)
    for timestep in (5, 100, 700):
        example = example_at(timestep)
        output = torch.zeros_like(example.target)
        product = (1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)).cumprod(0)[timestep]
        snr = (product / (1 - product)).item()
        plain, weighted = DDPM(CONFIG, CPU).loss(output, example), DDPM(config, CPU).loss(output, example)
        assert (weighted / plain).item() == pytest.approx(min(snr, 5) / snr, rel=1e-4)
