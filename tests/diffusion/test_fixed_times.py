"""Batches that are noised to times that are not drawn: closed forms, diffusers, and the loss of an engine."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler

from rmoe_megatron.config.model import DiffusionConfig, Objective
from rmoe_megatron.data.batch import Batch, TextConditions
from rmoe_megatron.diffusion.ddpm import DDPM
from rmoe_megatron.diffusion.loss import DiffusionLoss
from rmoe_megatron.diffusion.rectified_flow import RectifiedFlow
from rmoe_megatron.engine.registry import build_engine
from rmoe_megatron.model.build import build_chunks
from rmoe_megatron.training.loop import FIXED_TIMES
from tests.support.configurations import one_rank, tiny_config


def batch(config_channels: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(4, config_channels, 4, 4, generator=generator)
    text = TextConditions(torch.randn(4, 5, 12, generator=generator), torch.randn(4, 10, generator=generator))
    return Batch(latents, text, torch.arange(4))


def test_the_times_are_eighths() -> None:
    assert FIXED_TIMES == [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875]


@pytest.mark.parametrize("time", FIXED_TIMES)
def test_a_flow_goes_so_far_to_the_noise_whatever_its_shift(time: float) -> None:
    keys, given = torch.arange(4) + 17, batch().at(time)
    assert given.time is not None
    flow = RectifiedFlow(DiffusionConfig(shift=3.0))
    example = flow.add_noise(given.latents, keys, given.time)
    noise = flow.add_noise(given.latents, keys).target + given.latents  # that of a drawn time
    torch.testing.assert_close(example.noisy_latents, (1 - time) * given.latents + time * noise)
    torch.testing.assert_close(example.target, noise - given.latents)
    assert example.timestep.tolist() == [1000 * time] * 4


@pytest.mark.parametrize("time", FIXED_TIMES)
def test_ddpm_is_noised_to_so_many_of_its_timesteps(time: float) -> None:
    keys, given = torch.arange(4) + 17, batch().at(time)
    ddpm = DDPM(DiffusionConfig(objective=Objective.ddpm), torch.device("cpu"))
    example = ddpm.add_noise(given.latents, keys, given.time)
    assert example.timestep.tolist() == [int(1000 * time)] * 4
    assert (example.target == ddpm.add_noise(given.latents, keys).target).all()
    theirs = DDPMScheduler(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear")
    expected = theirs.add_noise(given.latents, example.target, torch.full((4,), int(1000 * time)))
    torch.testing.assert_close(example.noisy_latents, expected, rtol=1e-5, atol=1e-5)


def test_an_engine_evaluates_at_the_time() -> None:
    """The loss of what the model answers, worked out in float64, twice the same and not that of drawn times."""
    config = tiny_config()
    config = replace(config, diffusion=replace(config.diffusion, shift=2.0))
    given = batch(config.model.in_channels)
    given = replace(
        given, latents=given.latents[:, :, : config.model.sample_size, : config.model.sample_size]
    )
    with one_rank(config) as device:
        modules = build_chunks(config).to(device)
        with torch.no_grad():
            for parameter in modules.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        null = TextConditions(torch.zeros(1, 5, 12), torch.zeros(1, 10))
        loss = DiffusionLoss(config, config.seed, null)
        engine = build_engine(config, modules, loss)
        found = {time: engine.evaluate([given.at(time)]) for time in (0.25, 0.75)}
        noised = loss.add_noise(given)
        noise = (noised.latents.target + given.latents).double()
        for time, value in found.items():
            noisy = (1 - time) * given.latents.double() + time * noise
            timesteps = torch.full((4,), 1000.0 * time)
            answer = engine.denoise(noisy.float(), timesteps, noised.rng_keys, noised.conditions)
            expected = (answer.double() - (noise - given.latents.double())).square().mean()
            assert value == pytest.approx(float(expected), rel=1e-5)
            assert engine.evaluate([given.at(time)]) == value
        assert len({*found.values(), engine.evaluate([given])}) == 3
