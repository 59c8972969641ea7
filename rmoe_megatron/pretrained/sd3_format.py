"""MM-DiT in diffusers: SD3Transformer2DModel and what this package adds to it."""

from pathlib import Path
from typing import Annotated, Any, NotRequired

from diffusers import SD3Transformer2DModel
from pydantic import Field, with_config

from rmoe_megatron.config.model import Architecture, ModelDescription, Objective, Prediction
from rmoe_megatron.diffusion.rectified_flow import MIN_SIGMA
from rmoe_megatron.errors import UserError
from rmoe_megatron.files.untrusted import OPEN
from rmoe_megatron.hf.recurrent_sd3 import RecurrentSD3Transformer2DModel
from rmoe_megatron.pretrained.config_files import MAX_LAYERS, TransformerConfig, Width
from rmoe_megatron.pretrained.transformer_format import TransformerFormat, require_fixed


@with_config(OPEN)
class SD3Config(TransformerConfig):
    """SD3Transformer2DModel and RecurrentSD3Transformer2DModel."""

    joint_attention_dim: Width
    pooled_projection_dim: Width
    pos_embed_max_size: Annotated[int, Field(ge=1, le=2048)]
    caption_projection_dim: NotRequired[Width]
    dual_attention_layers: NotRequired[
        Annotated[list[Annotated[int, Field(ge=0, lt=MAX_LAYERS)]], Field(max_length=MAX_LAYERS)] | None
    ]
    qk_norm: NotRequired[str | None]
    rope_theta: NotRequired[Annotated[float, Field(gt=1, le=1e9)] | None]
    text_on_grid: NotRequired[bool]
    exclusive_attention: NotRequired[bool]
    min_sigma: NotRequired[Annotated[float, Field(gt=0, le=1)] | None]


class SD3Format(TransformerFormat):
    """Stable Diffusion 3 and 3.5."""

    stock, own, config = SD3Transformer2DModel, RecurrentSD3Transformer2DModel, SD3Config
    objective = Objective.rectified_flow

    def arguments(self, description: ModelDescription) -> dict[str, Any]:
        """Return what says text, positions, norms and second attentions."""
        model = description.model
        arguments: dict[str, Any] = {
            "out_channels": model.in_channels,
            "joint_attention_dim": model.text_hidden_size,
            "caption_projection_dim": model.hidden_size,
            "pooled_projection_dim": model.pooled_size,
            "pos_embed_max_size": model.pos_embed_max_size,
            "dual_attention_layers": tuple(model.dual_attention_layers),
            "qk_norm": "rms_norm" if model.qk_norm else None,
        }
        if description.diffusion.prediction is Prediction.sample:
            arguments["min_sigma"] = MIN_SIGMA
        if model.exclusive_attention:
            arguments["exclusive_attention"] = True
        if model.rope_theta is not None:
            arguments |= {"rope_theta": model.rope_theta, "text_on_grid": model.text_on_grid}
        return arguments

    def model_settings(self, values: dict[str, Any], path: Path, text_length: int) -> dict[str, Any]:
        """Return text, positions, norms and second attentions; diffusers does not know the length of the text."""
        hidden = values["num_attention_heads"] * values["attention_head_dim"]
        require_fixed(path, values, {"caption_projection_dim": hidden})
        require_fixed(path, values, {"out_channels": values["in_channels"]})
        if values.get("qk_norm") not in (None, "rms_norm"):
            raise UserError(f"{path} has qk_norm {values['qk_norm']}; supported are null and rms_norm.")
        if values.get("min_sigma") not in (None, MIN_SIGMA):
            raise UserError(
                f"{path} has min_sigma {values['min_sigma']}; supported are null and {MIN_SIGMA}."
            )
        on_grid = values.get("text_on_grid", False)
        if on_grid:
            text_length = max(text_length, (values["sample_size"] // values["patch_size"]) ** 2)
        return {
            "architecture": Architecture.mmdit,
            "qk_norm": values.get("qk_norm") == "rms_norm",
            "text_length": text_length,
            "text_hidden_size": values["joint_attention_dim"],
            "pooled_size": values["pooled_projection_dim"],
            "pos_embed_max_size": values["pos_embed_max_size"],
            "dual_attention_layers": list(values.get("dual_attention_layers") or ()),
            "rope_theta": values.get("rope_theta"),
            "text_on_grid": on_grid,
            "exclusive_attention": values.get("exclusive_attention", False),
        }
