"""DiT in diffusers: DiTTransformer2DModel and what this package adds to it."""

from pathlib import Path
from typing import Annotated, Any, NotRequired

from diffusers import DiTTransformer2DModel
from pydantic import Field, with_config

from rmoe_megatron.config.model import Architecture, ModelConfig, ModelDescription, Objective
from rmoe_megatron.errors import UserError
from rmoe_megatron.files.untrusted import OPEN
from rmoe_megatron.hf.recurrent_dit import RecurrentDiTTransformer2DModel
from rmoe_megatron.pretrained.config_files import Fraction, Heads, Rows, TransformerConfig
from rmoe_megatron.pretrained.transformer_format import TransformerFormat, require_fixed

# What the architecture here has fixed; a diffusers config that says otherwise is refused.
FIXED = {
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "dropout": 0.0,
}


@with_config(OPEN)
class DiTConfig(TransformerConfig):
    """DiTTransformer2DModel and RecurrentDiTTransformer2DModel."""

    num_embeds_ada_norm: Rows
    norm_eps: NotRequired[Annotated[float, Field(gt=0, le=1)]]
    downscale_freq_shift: NotRequired[Fraction]
    timestep_scale: NotRequired[Annotated[float, Field(gt=0, le=1)]]
    norm_num_groups: NotRequired[Heads]
    attention_bias: NotRequired[bool]
    norm_elementwise_affine: NotRequired[bool]
    upcast_attention: NotRequired[bool]
    activation_fn: NotRequired[str]
    norm_type: NotRequired[str]
    dropout: NotRequired[Fraction]


class DiTFormat(TransformerFormat):
    """DiT of all sizes."""

    stock, own, config = DiTTransformer2DModel, RecurrentDiTTransformer2DModel, DiTConfig
    objective = Objective.ddpm

    def arguments(self, description: ModelDescription) -> dict[str, Any]:
        """Return what says classes, variance, norms and timestep features."""
        model = description.model
        arguments: dict[str, Any] = {
            "out_channels": model.in_channels * (2 if model.learned_sigma else 1),
            "num_embeds_ada_norm": model.num_classes,
            "norm_eps": model.mlp_norm_eps,
        }
        if model.downscale_freq_shift != ModelConfig.downscale_freq_shift:
            arguments["downscale_freq_shift"] = model.downscale_freq_shift
        if model.timestep_scale != ModelConfig.timestep_scale:
            arguments["timestep_scale"] = model.timestep_scale
        return arguments

    def model_settings(self, values: dict[str, Any], path: Path, text_length: int) -> dict[str, Any]:
        """Return classes, variance, norms and timestep features; there is no text."""
        require_fixed(path, values, FIXED)
        channels = values["in_channels"]
        out_channels = values.get("out_channels") or channels
        if out_channels not in (channels, 2 * channels):
            raise UserError(
                f"{path} has out_channels {out_channels}; supported are {channels} and {2 * channels}."
            )
        return {
            "architecture": Architecture.dit,
            "qk_norm": False,
            "mlp_norm_eps": values.get("norm_eps", 1.0e-5),
            "num_classes": values["num_embeds_ada_norm"],
            "learned_sigma": out_channels == 2 * channels,
            "downscale_freq_shift": values.get("downscale_freq_shift", ModelConfig.downscale_freq_shift),
            "timestep_scale": values.get("timestep_scale", ModelConfig.timestep_scale),
        }
