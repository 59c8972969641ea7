"""Sample grids during training, from the training model itself: the pictures that ``rmoe sample`` makes of its export."""

from collections.abc import Callable

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.counter_rng import Purpose, derive, sample_keys
from rmoe_megatron.data.batch import Conditions, Prompts
from rmoe_megatron.diffusion.build import build_scheduler
from rmoe_megatron.diffusion.guidance import guide
from rmoe_megatron.encoders.autoencoder import Autoencoder, decode_latents
from rmoe_megatron.files.images import labelled_grid

Denoiser = Callable[[Tensor, Tensor, Tensor, Conditions], Tensor]


class SampleGrid:
    """Draws the configured prompts with the weights of the moment, always from the same noise."""

    def __init__(self, config: RunConfig, prompts: Prompts, autoencoder: Autoencoder) -> None:
        self.config = config
        self.prompts = prompts
        self.autoencoder = autoencoder

    def draw(self, model: Denoiser, height: int, width: int) -> Image.Image:
        """Sample every prompt once, in latents of this size, and return them as a labelled grid."""
        latents = sample_latents(model, self.prompts, self.config, height, width)
        return labelled_grid(decode_latents(self.autoencoder, latents).numpy(), self.prompts.captions)


@torch.no_grad()
def sample_latents(
    model: Denoiser,
    prompts: Prompts,
    config: RunConfig,
    height: int,
    width: int,
    numbers: Tensor | None = None,
) -> Tensor:
    """Sample latents float32 [N, C, height, width] with classifier-free guidance, as ``training.sample_*`` says.

    The noise of a prompt is the one that diffusers' pipelines draw for an image from a generator whose seed is the run's plus the
    prompt's number.

    Args:
        model: an engine's ``denoise``.
        numbers: the prompts' numbers among all, which their noise depends on, int64 [N]; None counts them from 0.
    """
    shape = (config.model.in_channels, height, width)
    count, device = len(prompts.captions), prompts.conditions.device
    numbers = torch.arange(count) if numbers is None else numbers
    keys = derive(sample_keys(config.seed, numbers.to(device)), Purpose.samples)
    generators = [torch.Generator("cpu").manual_seed(config.seed + number) for number in numbers.tolist()]
    latents = randn_tensor((count, *shape), generators, device, torch.float32)
    conditions = prompts.conditions.combine(
        prompts.null_conditions, lambda values, empty: torch.cat((values, empty.expand_as(values)))
    )
    scheduler = build_scheduler(config, height, width)
    scheduler.set_timesteps(config.training.sample_steps, device=device)
    for timestep in scheduler.timesteps:
        timesteps = timestep.float().expand(2 * count)
        output = model(latents.repeat(2, 1, 1, 1), timesteps, keys.repeat(2), conditions)
        guided = guide(output[:, : shape[0]], config.training.sample_guidance)
        latents = scheduler.step(guided, timestep, latents).prev_sample
    return latents
