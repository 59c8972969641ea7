"""How DiT and SiT are sampled for their published scores (github.com/facebookresearch/DiT, github.com/willisma/SiT).

Classes are drawn at random. Guidance moves the first three of the four channels of the latents and leaves the conditional prediction in
the fourth. A DDPM with a learned variance is sampled by ancestral steps with that variance, without clipping. The pixels are
127.5 x + 128, cut to whole numbers.
"""

import inspect
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from torch import Tensor

from rmoe_megatron.errors import UserError
from rmoe_megatron.files.untrusted import read_json
from rmoe_megatron.inference.sampling import load_sampler, seeded_steps
from rmoe_megatron.pretrained.architecture import read_architecture
from rmoe_megatron.pretrained.config_files import OBJECT
from rmoe_megatron.pretrained.pipeline_folder import MODEL_INDEX, PIPELINES

GUIDED_CHANNELS = 3


class Mode(Enum):
    """How classes are sampled: as for the published scores, or by the folder's pipeline."""

    dit = "dit"
    pipeline = "pipeline"


def published_sampler(folder: Path, asked: str | None) -> SchedulerMixin:
    """Return the sampler of the published scores for a diffusers folder, or the one that is asked for.

    A model that predicts noise and a variance is sampled by ancestral steps with this variance; any other by its own sampler.

    Args:
        asked: as ``make_sampler`` takes it.

    Raises:
        UserError: the folder holds no pipeline, or the sampler does not fit it.
    """
    sampler = load_sampler(folder, asked)
    learns_variance = read_architecture(folder / "transformer", text_length=1).model.learned_sigma
    if asked is not None or not learns_variance or sampler.config.get("shift") is not None:
        return sampler
    settings = {"variance_type": "learned_range", "timestep_spacing": "linspace", "clip_sample": False}
    ancestral = DDPMScheduler.from_config(sampler.config, **settings)
    # As in the published code, the coefficients of the steps are worked out in float64.
    ancestral.alphas_cumprod = torch.cumprod(1 - _betas(ancestral), dim=0)
    return ancestral


def require_class_conditional(folder: Path) -> int:
    """Return how many classes a model draws.

    Raises:
        UserError: the folder is no diffusers folder, or its model draws captions.
    """
    index = read_json(folder / MODEL_INDEX, OBJECT) if (folder / MODEL_INDEX).exists() else {}
    pipeline = PIPELINES.get(str(index.get("_class_name")))
    if (
        index
        and pipeline is not None
        and "class_labels" not in inspect.signature(pipeline.__call__).parameters
    ):
        raise UserError(
            f"{folder} draws captions, not classes: ImageNet's scores are those of class-conditional models; take rmoe eval geneval "
            "or another benchmark of prompts."
        )
    load_sampler(folder, None)  # says what is wrong with a folder of something else
    return read_architecture(folder / "transformer", text_length=1).model.num_classes


def _betas(scheduler: DDPMScheduler) -> Tensor:
    """Return the variances of the steps of training, float64."""
    config = scheduler.config
    if config.beta_schedule == "linear" and config.trained_betas is None:
        return torch.linspace(
            config.beta_start, config.beta_end, config.num_train_timesteps, dtype=torch.float64
        )
    return scheduler.betas.double()


@torch.no_grad()
def sample(
    pipeline: Any,
    labels: list[int],
    seeds: list[int],
    steps: int,
    guidance: float,
    interval: tuple[float, float] = (0.0, 1.0),
) -> NDArray[np.uint8]:
    """Make one image of every class label, in one batch.

    Args:
        pipeline: class-conditional, with the sampler of :func:`published_sampler`.
        seeds: one for every image, whose noise, also that of the steps, depends on its own seed alone.
        guidance: the scale of classifier-free guidance; 1 applies none.
        interval: guide only where timestep / 1000 lies in it.

    Returns:
        uint8 [N, H, W, 3].

    Raises:
        UserError: an image is not finite.
    """
    transformer, scheduler = pipeline.transformer, pipeline.scheduler
    config, device = transformer.config, transformer.device
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
    latents = randn_tensor(shape, generator=generators, device=device, dtype=torch.float32)
    classes = torch.tensor(labels, device=device)
    scheduler.set_timesteps(steps, device=device)
    latents = latents * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else latents
    with seeded_steps(scheduler, generators):
        for timestep in scheduler.timesteps:
            scaled = latents
            if hasattr(scheduler, "scale_model_input"):
                scaled = scheduler.scale_model_input(latents, timestep)
            guided = guidance != 1 and interval[0] <= float(timestep) / 1000 <= interval[1]
            output = predict(transformer, scaled, timestep, classes, guidance if guided else 1.0)
            takes_variance = getattr(scheduler, "variance_type", None) == "learned_range"
            output = output if takes_variance else output[:, : config.in_channels]
            latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    return _decode(pipeline.vae, latents)


def predict(transformer: Any, latents: Tensor, timestep: Tensor, classes: Tensor, guidance: float) -> Tensor:
    """Return the model's output float32 [B, C or 2 C, H, W], of which guidance has moved the first three channels.

    Args:
        classes: int64 [B].
        guidance: the scale of classifier-free guidance; 1 applies none.
    """
    if guidance != 1:
        null = torch.full_like(classes, transformer.config.num_embeds_ada_norm)
        latents, classes = latents.repeat(2, 1, 1, 1), torch.cat((classes, null))
    output = transformer(
        hidden_states=latents.to(transformer.dtype), timestep=timestep.float().expand(len(latents)),
        class_labels=classes, return_dict=False,
    )[0].float()  # fmt: skip
    if guidance == 1:
        return output
    conditional, unconditional = output.chunk(2)
    moved, base = conditional[:, :GUIDED_CHANNELS], unconditional[:, :GUIDED_CHANNELS]
    return torch.cat((base + guidance * (moved - base), conditional[:, GUIDED_CHANNELS:]), dim=1)


def _decode(vae: Any, latents: Tensor) -> NDArray[np.uint8]:
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    unscaled = latents / vae.config.scaling_factor + shift
    pixels = vae.decode(unscaled.to(vae.dtype), return_dict=False)[0].float()
    if not pixels.isfinite().all():
        raise UserError(
            "The model made a picture that is not finite; try --dtype fp32, or check the model's weights."
        )
    whole = (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8)
    return whole.permute(0, 2, 3, 1).cpu().numpy()
