"""What is lost when the original DiT is exported to diffusers' own class, measured with the exported weights."""

from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel, ModelMixin
from torch import Tensor

from rmoe_megatron.hf.recurrent_dit import RecurrentDiTTransformer2DModel

TIMESTEPS = (0, 250, 500, 750, 999)
SAMPLES = 4  # latents per timestep


def output_errors(folder: Path, downscale_freq_shift: float) -> dict[int, float]:
    """Compare a transformer of diffusers' own class with the exact model of the same weights, on random latents.

    Args:
        folder: holds the DiTTransformer2DModel; one model at a time is loaded from it, in float32.
        downscale_freq_shift: the value of the exact model.

    Returns:
        By timestep: norm of the outputs' difference divided by the norm of the exact output.
    """
    exact = _outputs(
        RecurrentDiTTransformer2DModel.from_pretrained(folder, downscale_freq_shift=downscale_freq_shift)
    )
    approximate = _outputs(DiTTransformer2DModel.from_pretrained(folder))
    return {
        timestep: float((approximate[timestep] - output).norm() / output.norm().clamp_min(1e-12))
        for timestep, output in exact.items()
    }


def _outputs(model: ModelMixin) -> dict[int, Tensor]:
    """Return the outputs [B, C or 2 C, H, W] by timestep, for latents and labels that are always the same."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    shape = (SAMPLES, config.in_channels, config.sample_size, config.sample_size)
    latents = torch.randn(shape, generator=generator)
    labels = torch.randint(config.num_embeds_ada_norm, (SAMPLES,), generator=generator)
    model.eval()
    with torch.no_grad():
        return {
            timestep: model(
                latents, timestep=torch.full((SAMPLES,), float(timestep)), class_labels=labels
            ).sample
            for timestep in TIMESTEPS
        }
