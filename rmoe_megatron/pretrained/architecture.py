"""Which diffusers class a configuration is, with which arguments, and back."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from pydantic import TypeAdapter

from rmoe_megatron.config.model import (
    Architecture,
    DiffusionConfig,
    LoopConfig,
    ModelConfig,
    ModelDescription,
    Prediction,
    RecurrenceConfig,
)
from rmoe_megatron.errors import UserError
from rmoe_megatron.files.untrusted import read_json, shown
from rmoe_megatron.pretrained.config_files import OBJECT, check_config, read_config
from rmoe_megatron.pretrained.dit_format import DiTFormat
from rmoe_megatron.pretrained.sd3_format import SD3Format
from rmoe_megatron.pretrained.transformer_format import TransformerFormat, require_fixed

FORMATS: dict[Architecture, TransformerFormat] = {
    Architecture.mmdit: SD3Format(),
    Architecture.dit: DiTFormat(),
}
_BY_CLASS = {cls.__name__: each for each in FORMATS.values() for cls in (each.stock, each.own)}
CLASSES: dict[str, type[ModelMixin]] = {
    cls.__name__: cls for each in FORMATS.values() for cls in (each.stock, each.own)
}
TRANSFORMERS: dict[str, TypeAdapter[Any]] = {
    name: TypeAdapter(each.config) for name, each in _BY_CLASS.items()
}
# What diffusers called a DiT before it had a class of its own, as facebook/DiT-XL-2-256 says; other norms were other models.
FORMER_DIT, FORMER_NORM = "Transformer2DModel", "ada_norm_zero"
# What that class did where its configuration does not say it, and DiT's does not.
FORMER_DEFAULTS = {
    "norm_type": "layer_norm",
    "activation_fn": "geglu",
    "attention_bias": False,
    "norm_elementwise_affine": True,
}
FORMER_FIXED = {
    "cross_attention_dim": None,
    "num_vector_embeds": None,
    "caption_channels": None,
    "double_self_attention": False,
    "only_cross_attention": False,
    "use_linear_projection": False,
}
RECURRENCE_KEYS = ("layers", "num_modules", "steps", "rank", "modulation", "gate_inputs")


def beyond_diffusers(config: ModelDescription) -> list[str]:
    """Return what of a model diffusers' own class cannot express: names of settings with their values."""
    found = []
    if config.recurrence is not None:
        found.append("recurrence")
    if config.loop is not None:
        found.append("loop")
    if config.model.exclusive_attention:
        found.append("model.exclusive_attention")
    if config.model.rope_theta is not None:
        found.append(f"model.rope_theta={config.model.rope_theta:g}")
    if config.diffusion.prediction is Prediction.sample:
        found.append("diffusion.prediction=sample")
    if config.model.downscale_freq_shift != ModelConfig.downscale_freq_shift:
        found.append(f"model.downscale_freq_shift={config.model.downscale_freq_shift:g}")
    if config.model.timestep_scale != ModelConfig.timestep_scale:
        found.append(f"model.timestep_scale={config.model.timestep_scale:g}")
    return found


def with_diffusers_timesteps[M: ModelDescription](config: M) -> M:
    """Return a configuration with the timestep features of diffusers' own class; weights fit, outputs differ."""
    return replace(config, model=replace(config.model, downscale_freq_shift=ModelConfig.downscale_freq_shift))


def transformer_class(config: ModelDescription, own: bool = False) -> type[ModelMixin]:
    """Return diffusers' own class where it can express the model, ours where not or if ``own`` asks for it."""
    transformer = FORMATS[config.model.architecture]
    return transformer.own if own or beyond_diffusers(config) else transformer.stock


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
    arguments |= FORMATS[model.architecture].arguments(config)
    if config.recurrence is not None:
        settings = asdict(config.recurrence)
        arguments["recurrence"] = {key: settings[key] for key in RECURRENCE_KEYS}
    if config.loop is not None:
        arguments["loop"] = asdict(config.loop)
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
    loop: LoopConfig | None = None


def read_architecture(folder: Path, text_length: int) -> ImportedArchitecture:
    """Translate the config.json of a diffusers transformer.

    Args:
        folder: that of the transformer.
        text_length: which diffusers' config does not know.

    Raises:
        UserError: the file is missing, of another class, or of a variant that is not supported.
    """
    path = folder / "config.json"
    return describe_architecture(read_transformer_config(path), path, text_length)


def read_transformer_config(path: Path) -> dict[str, Any]:
    """Read the config.json of a transformer; ``_class_name`` is that of one of today's classes.

    Raises:
        UserError: the file cannot be read, is of another class, or has a value that its class cannot have.
    """
    named = read_json(path, OBJECT)
    if named.get("_class_name") != FORMER_DIT:
        return read_config(path, TRANSFORMERS)
    values = FORMER_DEFAULTS | named
    if values["norm_type"] != FORMER_NORM:
        raise UserError(
            f"{path} describes a {FORMER_DIT} with norm_type {shown(values['norm_type'])}, which is no DiT; supported is "
            f"{FORMER_NORM}."
        )
    require_fixed(path, values, FORMER_FIXED)
    return check_config(values | {"_class_name": DiTFormat.stock.__name__}, TRANSFORMERS, path)


def describe_architecture(values: dict[str, Any], path: Path, text_length: int) -> ImportedArchitecture:
    """Translate a checked configuration of diffusers.

    Args:
        path: where it is from, for messages.
        text_length: which diffusers' config does not know.

    Raises:
        UserError: it is of a variant that is not supported.
    """
    transformer, heads = _BY_CLASS[values["_class_name"]], values["num_attention_heads"]
    model = ModelConfig(
        sample_size=values["sample_size"],
        patch_size=values["patch_size"],
        in_channels=values["in_channels"],
        num_layers=values["num_layers"],
        hidden_size=heads * values["attention_head_dim"],
        num_attention_heads=heads,
        **transformer.model_settings(values, path, text_length),
    )
    recurrence, loop = values.get("recurrence"), values.get("loop")
    diffusion = DiffusionConfig(objective=transformer.objective)
    if values.get("min_sigma") is not None:
        diffusion.prediction = Prediction.sample
    return ImportedArchitecture(
        model,
        RecurrenceConfig(**recurrence) if recurrence else None,
        diffusion,
        LoopConfig(**loop) if loop else None,
    )
