"""Autoencoders: diffusers' AutoencoderKL, or pixels themselves behind the same interface."""

from pathlib import Path
from typing import TypeAlias

import torch
from diffusers import AutoencoderKL, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor

from rmoe_megatron.errors import UserError


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


class PixelCodec(ModelMixin, ConfigMixin):
    """Latents are the pixels. The default shift and scale bring those of the toy shapes set to the order of one."""

    config_name = "config.json"

    @register_to_config
    def __init__(
        self, scaling_factor: float = 2.5, shift_factor: float = -0.55, latent_channels: int = 3
    ) -> None:
        super().__init__()
        # diffusers reads a model's dtype and device from its first tensor.
        self.register_buffer("device_and_dtype", torch.zeros(1))

    def encode(self, sample: Tensor) -> AutoencoderKLOutput:
        """Return images [B, C, H, W] in [-1, 1] as their own latents."""
        return AutoencoderKLOutput(latent_dist=PixelDistribution(sample))  # type: ignore[arg-type]

    def decode(self, latents: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Return latents as images."""
        return DecoderOutput(sample=latents) if return_dict else (latents,)


Autoencoder: TypeAlias = "PixelCodec | AutoencoderKL"


def load_autoencoder(name: str, device: torch.device) -> Autoencoder:
    """Load ``pixel``, or a diffusers AutoencoderKL from a local folder.

    Raises:
        UserError: the folder holds no autoencoder.
    """
    if name == "pixel":
        return PixelCodec().to(device)
    if not (Path(name) / "config.json").is_file():
        raise UserError(
            f"There is no autoencoder in {name} (no config.json); give a diffusers folder or `pixel`."
        )
    return AutoencoderKL.from_pretrained(name, local_files_only=True).eval().requires_grad_(False).to(device)


@torch.no_grad()
def encode_images(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Encode uint8 images [B, 3, H, W] to latents float32, shifted and scaled as in SD3."""
    pixels = images.to(autoencoder.device, autoencoder.dtype) / 127.5 - 1
    latents = autoencoder.encode(pixels).latent_dist.mode()
    return ((latents - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor).float()


@torch.no_grad()
def decode_latents(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Decode latents to uint8 images [B, H, W, 3]."""
    unscaled = (
        latents.to(autoencoder.dtype) / autoencoder.config.scaling_factor + autoencoder.config.shift_factor
    )
    pixels = autoencoder.decode(unscaled, return_dict=False)[0].float()
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()
