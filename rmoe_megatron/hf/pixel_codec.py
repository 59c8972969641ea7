"""Pixels themselves behind the interface of diffusers' AutoencoderKL.

This file and what it imports need diffusers alone: an exported folder can carry them (``--remote-code``).
"""

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor

from rmoe_megatron.hf.carried_code import CarriesCode

# DiffusionPipeline.from_pretrained loads a class of another library only if that module also names ModelMixin.
__all__ = ["ModelMixin", "PixelCodec"]


class PixelDistribution:
    """The certain distribution of a codec without noise."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def mode(self) -> Tensor:
        """Return the value."""
        return self.value

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Return the value; there is nothing to draw."""
        return self.value


class PixelCodec(CarriesCode, ModelMixin, ConfigMixin):
    """Latents are the pixels. The default shift and scale bring those of the toy shapes set to the order of one."""

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        scaling_factor: float = 2.5,
        shift_factor: float = -0.55,
        latent_channels: int = 3,
        block_out_channels: tuple[int, ...] = (1,),  # diffusers reads a latent's pixels from their number
    ) -> None:
        super().__init__()
        # diffusers reads a model's dtype and device from its first tensor.
        self.register_buffer("device_and_dtype", torch.zeros(1))

    def encode(self, sample: Tensor) -> AutoencoderKLOutput:
        """Return images [B, C, H, W] in [-1, 1] as their own latents."""
        return AutoencoderKLOutput(latent_dist=PixelDistribution(sample))

    def decode(self, latents: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Return latents as images."""
        return DecoderOutput(sample=latents) if return_dict else (latents,)
