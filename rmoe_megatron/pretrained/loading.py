"""Models and tokenizers that diffusers and transformers load from a folder: checked first, and loaded in this place only.

Nothing in a folder runs: there is no remote code, weights are safetensors, and classes are named by the caller.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import logging as transformers_logging

from rmoe_megatron.errors import UserError
from rmoe_megatron.files.foreign_errors import refusal
from rmoe_megatron.files.untrusted import read_json
from rmoe_megatron.pretrained.config_files import (
    AUTOENCODERS,
    OBJECT,
    SCHEDULERS,
    check_unknown_keys,
    read_config,
    read_text_encoder_config,
    read_tokenizer_config,
)
from rmoe_megatron.pretrained.model_files import DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS
from rmoe_megatron.pretrained.safetensors_folder import SafetensorsFolder

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")


def load_scheduler(folder: Path, scheduler_class: type[SchedulerMixin]) -> SchedulerMixin:
    """Load a sampler of diffusers from a folder with ``scheduler_config.json``.

    Raises:
        UserError: the configuration is malformed or of another class.
    """
    check_class(read_config(folder / "scheduler_config.json", SCHEDULERS), scheduler_class, folder)
    with refusal(f"{folder} cannot be loaded as a {scheduler_class.__name__}"):
        return scheduler_class.from_pretrained(folder, local_files_only=True)


def load_autoencoder_folder(folder: Path, autoencoder_class: type[ModelMixin]) -> ModelMixin:
    """Load an autoencoder of diffusers, or a PixelCodec, from its folder.

    Raises:
        UserError: configuration or weights are malformed, or are not of this class.
    """
    values = read_config(folder / "config.json", AUTOENCODERS)
    check_class(values, autoencoder_class, folder)
    with refusal(f"{folder} cannot be loaded as a {autoencoder_class.__name__}"), torch.device("meta"):
        empty = autoencoder_class.from_config(values)
    return load_diffusers_model(folder, autoencoder_class, empty)


def load_diffusers_model(folder: Path, model_class: type[ModelMixin], empty: nn.Module) -> ModelMixin:
    """Load a model of diffusers whose configuration has been checked.

    Args:
        empty: the model on the meta device.

    Raises:
        UserError: the weights are not those of the model.
    """
    variant = _check_weights(folder, DIFFUSERS_WEIGHTS, empty)
    with refusal(f"{folder} cannot be loaded as a {model_class.__name__}"):
        model, found = model_class.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, variant=variant, output_loading_info=True
        )
    _check_complete(folder, found["missing_keys"])
    return model.eval()


def load_text_encoder_folder(
    folder: Path, model_class: type[PreTrainedModel] | type[AutoModel], dtype: torch.dtype | str | None
) -> PreTrainedModel:
    """Load a transformers encoder from its folder.

    Args:
        model_class: AutoModel takes the class that the configuration names.
        dtype: the weights' type; ``auto`` keeps that of the files.

    Raises:
        UserError: configuration or weights are malformed, or are not of this class.
    """
    config = load_text_encoder_config(
        folder, AutoConfig if model_class is AutoModel else model_class.config_class
    )
    with refusal(f"{folder} cannot be loaded as a {model_class.__name__}"), torch.device("meta"):
        is_auto = model_class is AutoModel
        empty = AutoModel.from_config(config, trust_remote_code=False) if is_auto else model_class(config)
    variant = _check_weights(folder, TRANSFORMERS_WEIGHTS, empty)
    del empty
    with refusal(f"{folder} cannot be loaded as a {model_class.__name__}"), _without_report():
        model, found = model_class.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=dtype,
            variant=variant, output_loading_info=True,
        )  # fmt: skip
    # Many encoders are published without the pooler of their pre-training, which is not used here.
    _check_complete(folder, [name for name in found["missing_keys"] if not name.startswith("pooler.")])
    return model.eval().requires_grad_(False)


def load_judge(folder: Path, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """Load a transformers model that judges images (a detector, CLIP, a model that answers questions) from its folder.

    Args:
        model_class: the class that the configuration must be of.

    Raises:
        UserError: configuration or weights are malformed, or are not of this class.
    """
    values = read_json(folder / "config.json", OBJECT)
    check_unknown_keys(values, folder / "config.json")
    kind = model_class.config_class.model_type
    if values.get("model_type") != kind:
        raise UserError(
            f"{folder} holds a model of type {values.get('model_type')!r:.40}, where {kind} belongs."
        )
    with refusal(f"{folder / 'config.json'} cannot be used"):
        config = model_class.config_class.from_dict(values)
    with refusal(f"{folder} cannot be loaded as a {model_class.__name__}"), torch.device("meta"):
        empty = model_class(config)
    variant = _check_weights(folder, TRANSFORMERS_WEIGHTS, empty)
    del empty
    with refusal(f"{folder} cannot be loaded as a {model_class.__name__}"), _without_report():
        model, found = model_class.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype="auto",
            variant=variant, output_loading_info=True,
        )  # fmt: skip
    _check_complete(folder, list(found["missing_keys"]))
    return model.eval().requires_grad_(False)


def load_text_encoder_config(
    folder: Path, config_class: type[PreTrainedConfig] | type[AutoConfig]
) -> PreTrainedConfig:
    """Load the configuration of a transformers encoder.

    Raises:
        UserError: it is malformed or of another class.
    """
    values = read_text_encoder_config(folder / "config.json")
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} holds an adapter, which names weights elsewhere; merge it into its model first."
        )
    with refusal(f"{folder / 'config.json'} cannot be used"):
        if config_class is AutoConfig:
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return config_class.from_dict(values)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from its folder.

    Raises:
        UserError: a file of it is malformed or missing.
    """
    if not folder.is_dir():
        raise UserError(f"There is no tokenizer folder {folder}; download the model again.")
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            read_json(folder / name, OBJECT)
    if (folder / TOKENIZER_CONFIG).exists():
        read_tokenizer_config(folder / TOKENIZER_CONFIG)
    with refusal(f"{folder} cannot be loaded as a tokenizer"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers' table of missing tensors out of the log; they are named in the error."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Keep diffusers' warnings out of the log."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)


def check_class(values: dict[str, Any], expected: type, folder: Path) -> None:
    """Check that a configuration is that of the class that its folder should hold.

    Raises:
        UserError: it is another one's.
    """
    if values["_class_name"] != expected.__name__:
        raise UserError(f"{folder} holds a {values['_class_name']}, where a {expected.__name__} belongs.")


def _check_weights(folder: Path, single: str, empty: nn.Module) -> str | None:
    """Check that the files can hold the model: what they lack would be allocated and drawn at random.

    Returns:
        The variant whose name the files have, if any.
    """
    files = SafetensorsFolder(folder, single)
    held = sum(prod(shape) for shape in files.shapes.values())
    described = sum(parameter.numel() for parameter in empty.parameters())
    if described > 2 * held:
        raise UserError(
            f"{folder / 'config.json'} describes {described} parameters, but the weights beside it are {held}."
        )
    return files.variant


def _check_complete(folder: Path, missing: list[str]) -> None:
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} tensors of its model, {sorted(missing)[0]} among them; download it again."
        )
