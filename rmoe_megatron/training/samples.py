"""Sample grids during training, from the training model itself."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from rmoe_megatron.config.schema import DiffusionConfig, RunConfig
from rmoe_megatron.counter_rng import Purpose, derive, normal, sample_keys
from rmoe_megatron.diffusion.rectified_flow import to_velocity
from rmoe_megatron.encoders.autoencoder import Autoencoder, decode_latents
from rmoe_megatron.sampling import labelled_grid

Denoiser = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass
class Prompts:
    """Encoded prompts and the empty caption's embedding."""

    captions: list[str]
    text_hidden_states: Tensor  # [N, L, D]
    text_pooled: Tensor  # [N, P]
    null_text: tuple[Tensor, Tensor]  # [1, L, D], [1, P]


def scheduler_for(diffusion: DiffusionConfig) -> FlowMatchEulerDiscreteScheduler:
    """Return the sampler that fits the training objective."""
    return FlowMatchEulerDiscreteScheduler(shift=diffusion.shift)


class SampleGrid:
    """Draws the configured prompts with the weights of the moment, always from the same noise."""

    def __init__(self, config: RunConfig, prompts: Prompts, autoencoder: Autoencoder) -> None:
        self.config = config
        self.prompts = prompts
        self.autoencoder = autoencoder

    def draw(self, model: Denoiser) -> Image.Image:
        """Sample every prompt once and return them as a labelled grid."""
        training = self.config.training
        latents = sample_latents(
            model,
            self.prompts,
            (self.config.model.in_channels, self.config.model.sample_size, self.config.model.sample_size),
            self.config.diffusion,
            steps=training.sample_steps,
            guidance=training.sample_guidance,
            seed=self.config.seed,
        )
        return labelled_grid(decode_latents(self.autoencoder, latents).numpy(), self.prompts.captions)


@torch.no_grad()
def sample_latents(
    model: Denoiser,
    prompts: Prompts,
    shape: tuple[int, int, int],
    diffusion: DiffusionConfig,
    steps: int,
    guidance: float,
    seed: int,
) -> Tensor:
    """Sample latents float32 [N, C, H, W] with classifier-free guidance.

    Args:
        model: the training model, in evaluation mode.
        shape: of one latent, [C, H, W].
        steps: Euler steps.
        guidance: 1 is no guidance.
    """
    device = prompts.text_hidden_states.device
    count = len(prompts.captions)
    keys = sample_keys(seed, torch.arange(count, device=device))
    latents = normal(derive(keys, Purpose.noise), math.prod(shape)).view(count, *shape)
    hidden_states = torch.cat((prompts.text_hidden_states, prompts.null_text[0].expand(count, -1, -1)))
    pooled = torch.cat((prompts.text_pooled, prompts.null_text[1].expand(count, -1)))
    scheduler = scheduler_for(diffusion)
    scheduler.set_timesteps(steps, device=device)
    for timestep in scheduler.timesteps:
        inputs, timesteps = latents.repeat(2, 1, 1, 1), timestep.expand(2 * count)
        output = model(inputs, timesteps, hidden_states, pooled, keys.repeat(2))
        conditional, unconditional = to_velocity(diffusion.prediction, output, inputs, timesteps).chunk(2)
        guided = unconditional + guidance * (conditional - unconditional)
        latents = scheduler.step(guided, timestep, latents).prev_sample
    return latents
