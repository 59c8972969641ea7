"""Which diffusers class a configuration is, with which arguments, and back."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, ModelMixin, SD3Transformer2DModel

from rmoe_megatron.config.model import (
    Architecture,
    DiffusionConfig,
    ModelConfig,
    ModelDescription,
    Objective,
    Prediction,
    RecurrenceConfig,
)
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.diffusion.rectified_flow import MIN_SIGMA
from rmoe_megatron.errors import UserError
from rmoe_megatron.hf.recurrent_dit import RecurrentDiTTransformer2DModel
from rmoe_megatron.hf.recurrent_sd3 import RecurrentSD3Transformer2DModel
from rmoe_megatron.model.checks import check_model
from rmoe_megatron.pretrained.config_files import TRANSFORMERS, read_config

CLASSES: dict[str, type[ModelMixin]] = {
    cls.__name__: cls
    for cls in (
        SD3Transformer2DModel,
        RecurrentSD3Transformer2DModel,
        DiTTransformer2DModel,
        RecurrentDiTTransformer2DModel,
    )
}
# What the architectures here have fixed; a diffusers config that says otherwise is refused.
FIXED_DIT = {
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "dropout": 0.0,
}
MAX_POSITION_VALUES = 1 << 28  # SD3.5-medium's are 384 x 384 x 1536
RECURRENCE_KEYS = ("layers", "num_modules", "steps", "rank", "modulation", "gate_inputs")


def beyond_diffusers(config: ModelDescription) -> list[str]:
    """Return what of a model diffusers' own class cannot express: names of settings with their values."""
    found = []
    if config.recurrence is not None:
        found.append("recurrence")
    if config.diffusion.prediction is Prediction.sample:
        found.append("diffusion.prediction=sample")
    if not _has_diffusers_timesteps(config.model):
        found.append(f"model.downscale_freq_shift={config.model.downscale_freq_shift:g}")
    return found


def with_diffusers_timesteps(config: RunConfig) -> RunConfig:
    """Return a configuration with the timestep features of diffusers' own class; weights fit, outputs differ."""
    return replace(config, model=replace(config.model, downscale_freq_shift=ModelConfig.downscale_freq_shift))


def _has_diffusers_timesteps(model: ModelConfig) -> bool:
    return model.downscale_freq_shift == ModelConfig.downscale_freq_shift


def transformer_class(config: ModelDescription, own: bool = False) -> type[ModelMixin]:
    """Return diffusers' own class where it can express the model, ours where not or if ``own`` asks for it."""
    is_own = own or bool(beyond_diffusers(config))
    if config.model.architecture is Architecture.dit:
        return RecurrentDiTTransformer2DModel if is_own else DiTTransformer2DModel
    return RecurrentSD3Transformer2DModel if is_own else SD3Transformer2DModel


def transformer_arguments(config: ModelDescription) -> dict[str, Any]:
    """Return the arguments of :func:`transformer_class`; those that only our classes have where they are needed."""
    model = config.model
    arguments: dict[str, Any] = {
        "sample_size": model.sample_size,
        "patch_size": model.patch_size,
        "in_channels": model.in_channels,
        "num_layers": model.num_layers,
        "attention_head_dim": model.hidden_size // model.num_attention_heads,
        "num_attention_heads": model.num_attention_heads,
    }
    if model.architecture is Architecture.dit:
        arguments |= {
            "out_channels": model.in_channels * (2 if model.learned_sigma else 1),
            "num_embeds_ada_norm": model.num_classes,
            "norm_eps": model.mlp_norm_eps,
        }
        if not _has_diffusers_timesteps(model):
            arguments["downscale_freq_shift"] = model.downscale_freq_shift
    else:
        arguments |= {
            "out_channels": model.in_channels,
            "joint_attention_dim": model.text_hidden_size,
            "caption_projection_dim": model.hidden_size,
            "pooled_projection_dim": model.pooled_size,
            "pos_embed_max_size": model.pos_embed_max_size,
            "dual_attention_layers": tuple(model.dual_attention_layers),
            "qk_norm": "rms_norm" if model.qk_norm else None,
        }
        if config.diffusion.prediction is Prediction.sample:
            arguments["min_sigma"] = MIN_SIGMA
    if config.recurrence is not None:
        settings = asdict(config.recurrence)
        arguments["recurrence"] = {key: settings[key] for key in RECURRENCE_KEYS}
    return arguments


def empty_transformer(
    config: ModelDescription, dtype: torch.dtype = torch.float32, own: bool = False
) -> ModelMixin:
    """Return the diffusers model without memory for its weights: names, shapes, data type and configuration."""
    with torch.device("meta"):
        transformer = transformer_class(config, own)(**transformer_arguments(config))
    # Not ModelMixin's own to(), which warns about layers that lose precision: there are no values here.
    return torch.nn.Module.to(transformer, dtype)


@dataclass
class ImportedArchitecture:
    """What a diffusers transformer's config.json says."""

    model: ModelConfig
    recurrence: RecurrenceConfig | None
    diffusion: DiffusionConfig


def read_architecture(folder: Path, text_length: int) -> ImportedArchitecture:
    """Translate the config.json of a diffusers transformer.

    Args:
        folder: that of the transformer.
        text_length: which diffusers' config does not know.

    Raises:
        UserError: the file is missing, of another class, or of a variant that is not supported.
    """
    path = folder / "config.json"
    values = read_config(path, TRANSFORMERS)
    is_dit = issubclass(CLASSES[values["_class_name"]], DiTTransformer2DModel)
    model = _dit(values, path) if is_dit else _mmdit(values, path, text_length)
    recurrence = values.get("recurrence")
    diffusion = DiffusionConfig(objective=Objective.ddpm if is_dit else Objective.rectified_flow)
    if values.get("min_sigma") is not None:
        diffusion.prediction = Prediction.sample
    return ImportedArchitecture(model, RecurrenceConfig(**recurrence) if recurrence else None, diffusion)


def check_described_model(config: ModelDescription, where: str) -> None:
    """Check a model that a file describes, before anything of it is built.

    Raises:
        UserError: names ``where`` it is described, and what is wrong.
    """
    model = config.model
    try:
        check_model(config)
    except UserError as error:
        raise UserError(f"{where} describes no model: {error}") from error
    # Models compute their positions when they are built.
    side = max(model.sample_size // model.patch_size, model.pos_embed_max_size)
    if side**2 * model.hidden_size > MAX_POSITION_VALUES:
        raise UserError(
            f"{where} describes {side} x {side} positions of width {model.hidden_size}, "
            "more than any model has."
        )


def _sizes(values: dict[str, Any]) -> dict[str, Any]:
    heads = values["num_attention_heads"]
    return {
        "sample_size": values["sample_size"],
        "patch_size": values["patch_size"],
        "in_channels": values["in_channels"],
        "num_layers": values["num_layers"],
        "hidden_size": heads * values["attention_head_dim"],
        "num_attention_heads": heads,
    }


def _mmdit(values: dict[str, Any], path: Path, text_length: int) -> ModelConfig:
    sizes = _sizes(values)
    _require_fixed(path, values, {"caption_projection_dim": sizes["hidden_size"]})
    _require_fixed(path, values, {"out_channels": sizes["in_channels"]})
    if values.get("qk_norm") not in (None, "rms_norm"):
        raise UserError(f"{path} has qk_norm {values['qk_norm']}; supported are null and rms_norm.")
    return ModelConfig(
        **sizes,
        architecture=Architecture.mmdit,
        qk_norm=values.get("qk_norm") == "rms_norm",
        text_length=text_length,
        text_hidden_size=values["joint_attention_dim"],
        pooled_size=values["pooled_projection_dim"],
        pos_embed_max_size=values["pos_embed_max_size"],
        dual_attention_layers=list(values.get("dual_attention_layers") or ()),
    )


def _dit(values: dict[str, Any], path: Path) -> ModelConfig:
    sizes = _sizes(values)
    _require_fixed(path, values, FIXED_DIT)
    channels = values["in_channels"]
    out_channels = values.get("out_channels") or channels
    if out_channels not in (channels, 2 * channels):
        raise UserError(
            f"{path} has out_channels {out_channels}; supported are {channels} and {2 * channels}."
        )
    return ModelConfig(
        **sizes,
        architecture=Architecture.dit,
        qk_norm=False,
        mlp_norm_eps=values.get("norm_eps", 1.0e-5),
        num_classes=values["num_embeds_ada_norm"],
        learned_sigma=out_channels == 2 * channels,
        downscale_freq_shift=values.get("downscale_freq_shift", ModelConfig.downscale_freq_shift),
    )


def _require_fixed(path: Path, values: dict[str, Any], fixed: dict[str, Any]) -> None:
    for key, expected in fixed.items():
        if values.get(key, expected) != expected:
            raise UserError(f"{path} has {key} {values[key]}; supported is {expected}.")
