"""From a configuration to its objective and to the sampler that fits it."""

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from rmoe_megatron.config.model import ModelDescription, Objective
from rmoe_megatron.diffusion.ddpm import BETA_END, BETA_START, DDPM, NUM_TIMESTEPS
from rmoe_megatron.diffusion.objective import TrainingObjective
from rmoe_megatron.diffusion.rectified_flow import RectifiedFlow, resolution_shift


def build_objective(config: ModelDescription, device: torch.device) -> TrainingObjective:
    """Return what the run trains for; ``device`` is where the latents will be."""
    if config.diffusion.objective is Objective.ddpm:
        return DDPM(config.diffusion, device)
    return RectifiedFlow(config.diffusion)


def build_scheduler(
    config: ModelDescription, height: int | None = None, width: int | None = None
) -> FlowMatchEulerDiscreteScheduler | DDIMScheduler:
    """Return diffusers' deterministic sampler for the objective and latents of this size; None is the model's."""
    if config.diffusion.objective is Objective.ddpm:
        return DDIMScheduler(
            num_train_timesteps=NUM_TIMESTEPS,
            beta_start=BETA_START,
            beta_end=BETA_END,
            beta_schedule="linear",
            clip_sample=False,
        )
    size = config.model.sample_size
    shift = resolution_shift(config.diffusion, height or size, width or size)
    return FlowMatchEulerDiscreteScheduler(shift=shift)
