"""The autoencoder of a run: diffusers' AutoencoderKL, or pixels themselves behind the same interface."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from rmoe_megatron.errors import UserError
from rmoe_megatron.hf.pixel_codec import PixelCodec
from rmoe_megatron.pretrained.config_files import AUTOENCODERS, read_config
from rmoe_megatron.pretrained.hub import model_folder
from rmoe_megatron.pretrained.loading import load_autoencoder_folder
from rmoe_megatron.pretrained.model_files import autoencoder_parts

# Of the images that an autoencoder sees at once: four of 1024 x 1024. Stable Diffusion's widest layer has 128 channels of the image's
# size, half a gigabyte an image in float32, and several of them live at a time.
PIXELS_AT_ONCE = 1 << 22

type Autoencoder = PixelCodec | AutoencoderKL


def load_autoencoder(name: str, device: torch.device) -> Autoencoder:
    """Load ``pixel``, or an autoencoder from its folder, a pipeline's folder or the hub: AutoencoderKL, or a pixel codec.

    Raises:
        UserError: the folder holds no autoencoder, or a malformed one.
    """
    if name == "pixel":
        return PixelCodec().to(device)
    folder = model_folder(name, autoencoder_parts)
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    if not (folder / "config.json").exists():
        raise UserError(
            f"There is no autoencoder in {name} (no config.json); give a diffusers folder or `pixel`."
        )
    name_of_class = read_config(folder / "config.json", AUTOENCODERS)["_class_name"]
    found = PixelCodec if name_of_class == PixelCodec.__name__ else AutoencoderKL
    return load_autoencoder_folder(folder, found).requires_grad_(False).to(device)


@torch.no_grad()
def encode_images(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Encode uint8 images [B, 3, H, W] to latents float32, shifted and scaled as the autoencoder's config says.

    They are the mean of the distribution that the autoencoder gives. An image of more pixels than are encoded at once is encoded in
    diffusers' overlapping tiles.
    """
    latents = torch.cat([posterior.mode() for posterior in _posteriors(autoencoder, images)])
    return ((latents - shift_factor(autoencoder)) * autoencoder.config.scaling_factor).float()


@torch.no_grad()
def encode_distributions(autoencoder: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Encode uint8 images [B, 3, H, W] to normal distributions of latents, shifted and scaled as the autoencoder's config says.

    Returns:
        Mean and log-variance, float32 [B, C, h, w] each.
    """
    posteriors = list(_posteriors(autoencoder, images))
    mean = torch.cat([posterior.mean for posterior in posteriors])
    log_variance = torch.cat([posterior.logvar for posterior in posteriors])
    scale = autoencoder.config.scaling_factor
    mean = (mean - shift_factor(autoencoder)) * scale
    return mean.float(), (log_variance + 2 * math.log(abs(scale))).float()


def _posteriors(autoencoder: Autoencoder, images: Tensor) -> Iterator[Any]:
    """Yield the distributions of images [B, 3, H, W], as many at once as are encoded at once."""
    size = images.shape[2] * images.shape[3]
    tiled = size > PIXELS_AT_ONCE and isinstance(autoencoder, AutoencoderKL)
    if tiled:
        autoencoder.enable_tiling()
    for part in images.split(max(PIXELS_AT_ONCE // size, 1)):
        pixels = part.to(autoencoder.device, autoencoder.dtype) / 127.5 - 1
        yield autoencoder.encode(pixels).latent_dist
    if tiled:
        autoencoder.disable_tiling()


def shift_factor(autoencoder: Autoencoder) -> float:
    """Return the shift of the latents; autoencoders older than SD3's have none."""
    return autoencoder.config.shift_factor or 0.0


@torch.no_grad()
def decode_latents(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Decode latents to uint8 images [B, H, W, 3]."""
    unscaled = latents.to(autoencoder.dtype) / autoencoder.config.scaling_factor + shift_factor(autoencoder)
    pixels = autoencoder.decode(unscaled, return_dict=False)[0].float()
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()
