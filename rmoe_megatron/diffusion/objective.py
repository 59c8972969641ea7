"""What a training objective is: it adds noise to latents and computes the loss of the model's output."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass
class NoisedLatents:
    """Latents with noise: what the model sees, and what its output should be."""

    noisy_latents: Tensor  # float32 [B, C, H, W]
    timestep: Tensor  # float32 [B] in [0, 1000]
    target: Tensor  # velocity or noise, float32 [B, C, H, W]
    latents: Tensor  # without noise, float32 [B, C, H, W]


class TrainingObjective(Protocol):
    """Rectified flow or DDPM."""

    def drawn_time(self, rng_keys: Tensor) -> Tensor:
        """Return float32 [B] in [0, 1): the random share of the way to noise from which a sample's timestep follows, and grows with.

        Args:
            rng_keys: int64 [B], one per sample.
        """
        ...

    def add_noise(self, latents: Tensor, rng_keys: Tensor, time: Tensor | None = None) -> NoisedLatents:
        """Draw timesteps and noise for latents [B, C, H, W] from one int64 key per sample, [B].

        Args:
            time: float32 [B] in [0, 1), the share of the way to noise, instead of a drawn timestep; the noise is the same.
        """
        ...

    def loss(self, output: Tensor, noised: NoisedLatents) -> Tensor:
        """Return the mean loss of a batch, a float32 scalar."""
        ...


def mean_per_sample(values: Tensor) -> Tensor:
    """Return the mean over all but the first dimension, [B]."""
    return values.flatten(1).mean(dim=1)
