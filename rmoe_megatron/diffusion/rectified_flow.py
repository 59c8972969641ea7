"""Rectified flow as in SD3 (Esser et al., 2024): straight paths from data to noise."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rmoe_megatron.config.model import DiffusionConfig, Prediction, TimestepDensity
from rmoe_megatron.counter_rng import Purpose, derive, normal, uniform
from rmoe_megatron.diffusion.objective import NoisedLatents

TIMESTEPS = 1000.0  # the model is conditioned on sigma * TIMESTEPS, as diffusers' FlowMatchEulerDiscreteScheduler does

# A predicted sample gives the velocity (noisy - sample) / sigma; below this sigma the divisor stays.
MIN_SIGMA = 0.05


def resolution_shift(config: DiffusionConfig, height: int, width: int) -> float:
    """Return the shift of sigma for latents of this size.

    Signal-to-noise ratios agree between resolutions when the shift grows with the square root of the number of
    tokens (Esser et al., section 5.3.2), that is with the side of a square of as many.
    """
    if config.shift_base_size is None:
        return config.shift
    return config.shift * math.sqrt(height * width) / config.shift_base_size


def draw_sigma(config: DiffusionConfig, rng_keys: Tensor) -> Tensor:
    """Draw sigma in (0, 1) float32 [B] before the shift, from the configured density (Esser et al., section 3.1).

    Args:
        rng_keys: int64 [B], one key per sample.
    """
    rng_keys = derive(rng_keys, Purpose.timestep)
    if config.timestep_density is TimestepDensity.logit_normal:
        return torch.sigmoid(config.logit_mean + config.logit_std * normal(rng_keys, 1).squeeze(-1))
    u = uniform(rng_keys, 1).squeeze(-1)
    if config.timestep_density is TimestepDensity.mode:
        return 1 - u - config.mode_scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    if config.timestep_density is TimestepDensity.cosmap:
        return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)
    return u


class RectifiedFlow:
    """Noisy latents ``(1 - sigma) x + sigma noise``, target ``noise - x``, mean squared error."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config

    def drawn_time(self, rng_keys: Tensor) -> Tensor:
        """Return sigma before the shift, float32 [B], for samples' keys int64 [B]."""
        return draw_sigma(self.config, rng_keys)

    def add_noise(self, latents: Tensor, rng_keys: Tensor, time: Tensor | None = None) -> NoisedLatents:
        """Draw sigma and noise for latents float32 [B, C, H, W]; rng_keys are int64 [B], one per sample.

        A time that is given is sigma itself: no density and no shift is applied to it.
        """
        if time is None:
            sigma = self.drawn_time(rng_keys)
            shift = resolution_shift(self.config, *latents.shape[2:])
            sigma = shift * sigma / (1 + (shift - 1) * sigma)
        else:
            sigma = time
        noise = normal(derive(rng_keys, Purpose.noise), math.prod(latents.shape[1:])).view_as(latents)
        weight = sigma.view(-1, 1, 1, 1)
        return NoisedLatents(
            (1 - weight) * latents + weight * noise, sigma * TIMESTEPS, noise - latents, latents
        )

    def loss(self, velocity: Tensor, noised: NoisedLatents) -> Tensor:
        """Return the mean squared error of the velocity [B, C, H, W], a float32 scalar."""
        return F.mse_loss(velocity, noised.target)


def to_velocity(prediction: Prediction, output: Tensor, noisy_latents: Tensor, timestep: Tensor) -> Tensor:
    """Return the velocity float32 [B, C, H, W] that a model's output stands for.

    Predicting the sample is easier than predicting noise where patches have many values for the model's width; the
    loss and the sampler are those of the velocity in either case (Li and He, "Back to basics", 2025).

    Args:
        output: the model's output, [B, C, H, W].
        timestep: float32 [B], sigma * TIMESTEPS.
    """
    if prediction is Prediction.velocity:
        return output.float()
    sigma = (timestep / TIMESTEPS).clamp_min(MIN_SIGMA).view(-1, 1, 1, 1)
    return (noisy_latents - output.float()) / sigma
