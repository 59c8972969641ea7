"""From a run to a diffusers folder: diffusers' own classes where they can express the model, ours where not."""

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor

from rmoe_megatron.checkpoint.weights import RunWeights
from rmoe_megatron.config.model import ModelDescription
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.config.stages import stage_at, stages_of
from rmoe_megatron.conversion.approximation import output_errors
from rmoe_megatron.conversion.model_card import model_card
from rmoe_megatron.conversion.origin import PAGE, origin_of
from rmoe_megatron.conversion.pipeline_settings import pipeline_settings
from rmoe_megatron.conversion.remote_code import add_remote_code
from rmoe_megatron.conversion.weight_names import Copies, weight_rules
from rmoe_megatron.conversion.weight_record import weight_record
from rmoe_megatron.diffusion.build import build_scheduler
from rmoe_megatron.encoders.autoencoder import load_autoencoder
from rmoe_megatron.encoders.sd3_text import require_room_for_t5
from rmoe_megatron.encoders.text import has_one_encoder, load_text_encoder
from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic
from rmoe_megatron.files.untrusted import read_json
from rmoe_megatron.model.registry import ADAPTERS
from rmoe_megatron.pretrained.architecture import (
    beyond_diffusers,
    empty_transformer,
    with_diffusers_timesteps,
)
from rmoe_megatron.pretrained.config_files import OBJECT
from rmoe_megatron.pretrained.finite import require_finite
from rmoe_megatron.pretrained.hub import model_folder
from rmoe_megatron.pretrained.model_files import (
    MODEL_INDEX,
    TRANSFORMERS_WEIGHTS,
    copy_part,
    text_encoder_parts,
)
from rmoe_megatron.pretrained.safetensors_folder import MAX_SHARD_SIZE, parse_size, write_model

TRANSFORMER_CLASSES = ("auto", "diffusers", "rmoe")
SD3_COMPONENTS = [f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
REMEDY = "choose another --dtype (float16 ends at 65504), or an earlier --step if the run has diverged"
QKV_WEIGHT = "attention.linear_qkv.weight"
MERGED = [adapter for adapter in ADAPTERS if not adapter.weight_names]


def export_run(
    run_dir: Path,
    out: Path,
    step: int | None = None,
    averaged: bool = True,
    dtype: torch.dtype | None = None,
    base: Path | None = None,
    remote_code: bool = False,
    max_shard_size: str = MAX_SHARD_SIZE,
    transformer_class: str = "auto",
    approximate: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, float]:
    """Write a run as a diffusers folder, which appears whole or not at all.

    Args:
        step: checkpoint to export; None takes the newest complete one.
        averaged: the moving averages instead of the weights of the step.
        dtype: the data type of the exported weights; None keeps that of the checkpoint, and takes the widest where it has several.
        base: where the frozen base lies if not where the run's configuration says.
        remote_code: put the code of classes that diffusers lacks into the folder, for users without this package.
        max_shard_size: weights above it are written as several files.
        transformer_class: ``diffusers`` for diffusers' own, ``rmoe`` for ours, ``auto`` for diffusers' where it can
            express the model.
        approximate: give a DiT with the original's timestep features those of diffusers' own class.

    Returns:
        The relative errors of the output, by timestep, that ``approximate`` costs; empty for an exact export.

    Raises:
        UserError: the run has no complete checkpoint, the class cannot express its model, ``base`` is none of it, the
            shard size is none, a weight is not finite in ``dtype``, or ``out`` is not empty or cannot be written.
    """
    atomic.require_empty(out, "The output")
    shard_bytes = parse_size(max_shard_size)
    weights = RunWeights(run_dir, step, averaged, base)
    trained = at_stage_of(weights.config, weights.checkpoint.step)
    config = exported_config(trained, transformer_class, approximate)
    reader = DiffusersWeights(weights, dtype)
    transformer = empty_transformer(config, reader.dtype, own=transformer_class == "rmoe")
    exact = weights.config.model.downscale_freq_shift
    with atomic.building(out) as partial:
        (partial / "transformer").mkdir()
        record = weight_record(weights, averaged)
        write_model(transformer, reader.read, partial / "transformer", shard_bytes, progress, record)
        write_pipeline(config, transformer, partial)
        origin = origin_of(weights, base)
        card = model_card(weights, config, averaged, reader.dtype, transformer, partial, origin, remote_code)
        (partial / PAGE).write_text(card)
        if remote_code:
            add_remote_code(partial)
        is_exact = config.model.downscale_freq_shift == exact
        errors = {} if is_exact else output_errors(partial / "transformer", exact)
    return errors


def at_stage_of(config: RunConfig, step: int) -> RunConfig:
    """Return a run's configuration with the size of the stage that the step was of, in which its model makes images by itself.

    Raises:
        UserError: the size is part of what the model is.
    """
    if not config.training.stages:
        return config
    size = stage_at(stages_of(config), max(step - 1, 0)).sample_size
    if config.model.text_on_grid and size != config.model.sample_size:
        raise UserError(
            f"The run's stage of step {step} has latents of {size} x {size}, but with model.text_on_grid the text's positions are those "
            f"of {config.model.sample_size} x {config.model.sample_size}, of which a folder has one; export a step of that size."
        )
    return replace(config, model=replace(config.model, sample_size=size))


def exported_config[M: ModelDescription](config: M, transformer_class: str, approximate: bool) -> M:
    """Return the configuration of the model that an export holds: the run's, or what approximates it.

    Raises:
        UserError: there is no such class, or it cannot express the model.
    """
    if transformer_class not in TRANSFORMER_CLASSES:
        raise UserError(f"--transformer {transformer_class} must be {', '.join(TRANSFORMER_CLASSES)}.")
    if approximate and transformer_class != "diffusers":
        raise UserError(
            f"--approximate is for --transformer diffusers; {transformer_class} exports the model exactly."
        )
    exported = with_diffusers_timesteps(config) if approximate else config
    beyond = beyond_diffusers(exported)
    if transformer_class == "diffusers" and beyond:
        approximable = not beyond_diffusers(with_diffusers_timesteps(config))
        other = ", or accept other outputs with --approximate" if approximable else ""
        raise UserError(
            f"diffusers' own class cannot express {' and '.join(beyond)} of this model; leave --transformer "
            f"diffusers out{other}."
        )
    return exported


class DiffusersWeights:
    """A run's weights under diffusers' names, converted one tensor of the run at a time.

    An adapter that diffusers has no place for (LoRA) is merged into the projections that it adapts.
    """

    def __init__(self, weights: RunWeights, dtype: torch.dtype | None) -> None:
        self.weights = weights
        self.dtype = dtype or _common_dtype(location.dtype for location in weights.locations.values())
        names = [name for name in weights.locations if not any(f".{each.name}." in name for each in MERGED)]
        try:
            self.rules = weight_rules(names, weights.config.model)
        except KeyError as error:
            raise UserError(
                f"{weights.checkpoint.path} holds {error.args[0]}, which its model lacks."
            ) from error
        self.sources = {target: name for name, rule in self.rules.items() for target in rule.names}
        self._pending: dict[str, Tensor] = {}

    def read(self, target: str) -> Tensor:
        """Return the tensor of a diffusers name.

        Raises:
            UserError: the run has none.
        """
        name = self.sources.get(target)
        if name is None:
            raise UserError(
                f"{self.weights.checkpoint.path} lacks {target}, which its configuration describes."
            )
        rule = self.rules[name]
        if target not in self._pending:
            self._pending |= dict(zip(rule.names, rule.split(self._converted(name)), strict=True))
        tensor = self._pending.pop(target)
        # Tensors of a file must not share memory.
        return tensor.clone() if isinstance(rule, Copies) else tensor

    def _converted(self, name: str) -> Tensor:
        tensor = self.weights.locations[name].read()
        if name.endswith(QKV_WEIGHT):
            for adapter in MERGED:
                prefix = f"{name.removesuffix(QKV_WEIGHT)}{adapter.name}."
                places = self.weights.locations.items()
                added = {key.removeprefix(prefix): place for key, place in places if key.startswith(prefix)}
                if added:
                    tensors = {key: place.read() for key, place in added.items()}
                    tensor = adapter.merged(tensor, tensors, self.rules[name].join)
        converted = tensor.to(self.dtype)
        require_finite([(name, converted)], str(self.weights.checkpoint.path), _name_of(self.dtype), REMEDY)
        return converted


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _common_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the data type that holds all others: diffusers expects one in a file."""
    return functools.reduce(torch.promote_types, dtypes)


def write_pipeline(config: ModelDescription, transformer: ModelMixin, folder: Path) -> None:
    """Write all of a pipeline but the transformer's weights: frozen encoders, sampler and model_index.json."""
    if _has_sd3_encoders(config):
        _write_sd3_pipeline(config, transformer, folder)
        return
    pipeline = build_pipeline(config, transformer)
    for name, component in pipeline.components.items():
        if name != "transformer" and hasattr(component, "save_pretrained"):
            component.save_pretrained(folder / name)
    pipeline.save_config(folder)


def build_pipeline(config: ModelDescription, transformer: ModelMixin) -> DiffusionPipeline:
    """Put a transformer together with the frozen encoders and the sampler of a run without SD3's text encoders."""
    cpu = torch.device("cpu")
    scheduler, vae = build_scheduler(config), load_autoencoder(config.encoders.autoencoder, cpu)
    has_shift = vae.config.get("shift_factor") is not None
    pipeline_class, settings = pipeline_settings(config, has_sd3_encoders=False, vae_has_shift=has_shift)
    if config.model.is_class_conditional:
        return pipeline_class(transformer=transformer, vae=vae, scheduler=scheduler, **settings)
    encoder = load_text_encoder(config.encoders, config.model.text_length, cpu, config.model.text_hidden_size)
    return pipeline_class(
        transformer=transformer, scheduler=scheduler, vae=vae, **settings, **encoder.components()
    )


def _has_sd3_encoders(config: ModelDescription) -> bool:
    name = config.encoders.text_encoder
    if config.model.is_class_conditional or name == "minilm":
        return False
    parts = functools.partial(text_encoder_parts, dropped=config.encoders.dropped)
    folder = model_folder(name, parts)
    return (folder / MODEL_INDEX).is_file() and not has_one_encoder(folder)


def _write_sd3_pipeline(config: ModelDescription, transformer: ModelMixin, folder: Path) -> None:
    """Copy the text encoders of diffusers' own StableDiffusion3Pipeline; they can be larger than memory.

    Raises:
        UserError: the run's text has no tokens of T5, which no such pipeline can make.
    """
    require_room_for_t5(config.model.text_length)
    dropped = config.encoders.dropped
    source = model_folder(
        config.encoders.text_encoder, functools.partial(text_encoder_parts, dropped=dropped)
    )
    named: dict[str, Any] = read_json(source / MODEL_INDEX, OBJECT)
    pipeline_class, settings = pipeline_settings(config, has_sd3_encoders=True, vae_has_shift=True)
    index: dict[str, Any] = {
        "_class_name": pipeline_class.__name__,
        "_diffusers_version": diffusers.__version__,
        "image_encoder": [None, None],
        "feature_extractor": [None, None],
        **settings,
    }
    for name in SD3_COMPONENTS:
        index[name] = named.get(name, [None, None])
        if name.endswith("_3") and "t5" in dropped:
            index[name] = [None, None]
        elif (source / name).is_dir():
            weights = TRANSFORMERS_WEIGHTS if name.startswith("text_encoder") else None
            copy_part(source / name, folder / name, weights)
    autoencoder = load_autoencoder(config.encoders.autoencoder, torch.device("cpu"))
    if (
        autoencoder.config.shift_factor is None
    ):  # older than SD3, whose pipeline adds the shift to the latents
        autoencoder.register_to_config(shift_factor=0.0)
    components = {
        "transformer": transformer,
        "scheduler": build_scheduler(config),
        "vae": autoencoder,
    }
    for name, component in components.items():
        if name != "transformer":
            component.save_pretrained(folder / name)
        module = type(component).__module__
        library = "diffusers" if module.startswith("diffusers.") else module
        index[name] = [library, type(component).__name__]
    (folder / MODEL_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
