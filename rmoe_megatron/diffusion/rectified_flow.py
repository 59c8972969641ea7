"""Rectified flow as in SD3 (Esser et al., 2024): straight paths from data to noise, logit-normal timesteps."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rmoe_megatron.config.schema import DiffusionConfig, Prediction
from rmoe_megatron.counter_rng import Purpose, derive, normal, uniform

TIMESTEPS = 1000.0  # the model is conditioned on sigma * TIMESTEPS, as diffusers' FlowMatchEulerDiscreteScheduler does


# A predicted sample gives the velocity (noisy - sample) / sigma; below this sigma the divisor stays.
MIN_SIGMA = 0.05


@dataclass
class TrainingExample:
    """A noised batch: what the model sees and what it should answer."""

    noisy_latents: Tensor  # float32 [B, C, H, W]
    timestep: Tensor  # float32 [B], sigma * TIMESTEPS
    target: Tensor  # velocity, float32 [B, C, H, W]


def sample_sigma(config: DiffusionConfig, keys: Tensor) -> Tensor:
    """Draw sigma float32 [B]: sigmoid of a normal variable, then SD3's shift for resolution.

    Args:
        keys: int64 [B], one key per sample.
    """
    logit = config.logit_mean + config.logit_std * normal(derive(keys, Purpose.timestep), 1).squeeze(-1)
    sigma = torch.sigmoid(logit)
    return config.shift * sigma / (1 + (config.shift - 1) * sigma)


def add_noise(config: DiffusionConfig, latents: Tensor, keys: Tensor) -> TrainingExample:
    """Draw sigma and noise; the noisy latents are ``(1 - sigma) x + sigma noise``, the velocity ``noise - x``.

    Args:
        latents: float32 [B, C, H, W].
        keys: int64 [B], one key per sample.
    """
    sigma = sample_sigma(config, keys)
    noise = normal(derive(keys, Purpose.noise), math.prod(latents.shape[1:])).view_as(latents)
    weight = sigma.view(-1, 1, 1, 1)
    return TrainingExample((1 - weight) * latents + weight * noise, sigma * TIMESTEPS, noise - latents)


def to_velocity(prediction: Prediction, output: Tensor, noisy_latents: Tensor, timestep: Tensor) -> Tensor:
    """Return the velocity float32 [B, C, H, W] that a model's output stands for.

    Predicting the sample is easier than predicting noise where patches have many values for the model's width; the
    loss and the sampler are those of the velocity in either case (Li and He, "Back to basics", 2025).

    Args:
        output: of the model, [B, C, H, W].
        timestep: float32 [B], sigma * TIMESTEPS.
    """
    if prediction is Prediction.velocity:
        return output.float()
    sigma = (timestep / TIMESTEPS).clamp_min(MIN_SIGMA).view(-1, 1, 1, 1)
    return (noisy_latents - output.float()) / sigma


def drop_captions(
    config: DiffusionConfig,
    text_hidden_states: Tensor,
    text_pooled: Tensor,
    null_text: tuple[Tensor, Tensor],
    keys: Tensor,
) -> tuple[Tensor, Tensor]:
    """Replace a share of the captions by the empty caption, for classifier-free guidance.

    Args:
        text_hidden_states: [B, L, D].
        text_pooled: [B, P].
        null_text: the empty caption's token states [1, L, D] and pooled embedding [1, P].
        keys: int64 [B], one key per sample.
    """
    dropped = uniform(derive(keys, Purpose.guidance_dropout), 1) < config.guidance_dropout
    hidden_states, pooled = null_text
    return (
        torch.where(dropped.unsqueeze(-1), hidden_states, text_hidden_states),
        torch.where(dropped, pooled, text_pooled),
    )
