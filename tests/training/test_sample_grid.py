"""The noise that a run's sample grids start from."""

import math
from typing import Any

import pytest
import torch
from scipy import stats

from rmoe_megatron.counter_rng import sample_keys
from rmoe_megatron.data.batch import Conditions, Prompts, TextConditions
from rmoe_megatron.diffusion.build import build_objective
from rmoe_megatron.training.sample_grid import sample_latents
from tests.support.configurations import tiny_config


def test_pictures_start_from_noise_that_no_training_draw_has() -> None:
    config, count = tiny_config(None), 64
    config.training.sample_steps = 1
    seen: list[torch.Tensor] = []

    def recorded(latents: torch.Tensor, timestep: Any, keys: Any, conditions: Conditions) -> torch.Tensor:
        seen.append(latents.chunk(2)[0])
        return torch.zeros_like(latents)

    text = TextConditions(torch.zeros(count, 5, 12), torch.zeros(count, 10))
    sample_latents(recorded, Prompts(["a cat"] * count, text, text.map(lambda each: each[:1])), config, 8, 8)
    noise = seen[0].flatten(1).double()
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    draws = sample_keys(config.seed, torch.arange(4096))
    zeros = torch.zeros(4096, 3, 8, 8)
    trained = build_objective(config, zeros.device).add_noise(zeros, draws).target.flatten(1).double()
    cosines = torch.nn.functional.normalize(noise) @ torch.nn.functional.normalize(trained).T
    # Of independent vectors of 192 numbers: 6 standard deviations of 1 / sqrt(192).
    assert cosines.abs().max() < 6 / math.sqrt(192)
    assert torch.corrcoef(noise).triu(1).abs().max() == pytest.approx(0, abs=6 / math.sqrt(192))
