"""What a pipeline's folder says of a run beside its transformer: length of the text, encoders, objective, sampler.

Both directions: what of a run the folder of which pipeline can say, and what a folder says of a run.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusers import (
    DiffusionPipeline,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    StableDiffusion3Pipeline,
)

from rmoe_megatron.config.model import DiffusionConfig, EncodersConfig, ModelDescription, Objective
from rmoe_megatron.diffusion.build import build_scheduler
from rmoe_megatron.diffusion.ddpm import BETA_END, BETA_START, NUM_TIMESTEPS
from rmoe_megatron.encoders.text import is_minilm
from rmoe_megatron.errors import UserError
from rmoe_megatron.files.untrusted import check_value, read_json, shown
from rmoe_megatron.hf.dit_pipeline import RecurrentDiTPipeline
from rmoe_megatron.hf.pipeline import RecurrentSD3Pipeline
from rmoe_megatron.hf.pixel_codec import PixelCodec
from rmoe_megatron.hf.tuned_sd3_pipeline import TunedSD3Pipeline
from rmoe_megatron.pretrained.config_files import AUTOENCODERS, OBJECT, read_config
from rmoe_megatron.pretrained.model_files import MODEL_INDEX
from rmoe_megatron.pretrained.pipeline_folder import SETTINGS, load_pipeline_scheduler

logger = logging.getLogger(__name__)

STOCK_TEXT_LENGTH = 333  # of StableDiffusion3Pipeline: CLIP's 77 and 256 of T5
IMAGENET_CLASSES = 1000  # diffusers' DiTPipeline takes this number for the dropped label
# What the samplers of a run have fixed; with another value a folder's model would be another one.
FLOW_FIXED: dict[str, Any] = {
    "num_train_timesteps": NUM_TIMESTEPS, "use_dynamic_shifting": False, "shift_terminal": None, "invert_sigmas": False,
    "prediction_type": "flow_prediction", "rescale_betas_zero_snr": False,
}  # fmt: skip
DDPM_FIXED: dict[str, Any] = {
    "num_train_timesteps": NUM_TIMESTEPS, "beta_start": BETA_START, "beta_end": BETA_END, "beta_schedule": "linear",
    "trained_betas": None, "prediction_type": "epsilon", "rescale_betas_zero_snr": False, "thresholding": False,
}  # fmt: skip


def pipeline_settings(
    config: ModelDescription, has_sd3_encoders: bool, vae_has_shift: bool
) -> tuple[type[DiffusionPipeline], dict[str, Any]]:
    """Return the pipeline that can say what a run knows, diffusers' own where it can, and what its ``model_index.json`` gets.

    Args:
        has_sd3_encoders: the run's text encoders are those of an SD3 pipeline.
        vae_has_shift: the autoencoder's latents are shifted.
    """
    diffusion, model = config.diffusion, config.model
    by_size: dict[str, Any] = {"shift": None, "shift_base_size": None}
    if diffusion.objective is Objective.rectified_flow and diffusion.shift_base_size is not None:
        by_size = {"shift": diffusion.shift, "shift_base_size": diffusion.shift_base_size}
    if model.is_class_conditional:
        is_stock = diffusion.objective is Objective.ddpm and model.num_classes == IMAGENET_CLASSES
        return (DiTPipeline, {}) if is_stock and not vae_has_shift else (RecurrentDiTPipeline, by_size)
    if not has_sd3_encoders:
        return RecurrentSD3Pipeline, by_size | {"text_length": model.text_length}
    dropped = sorted(config.encoders.dropped)
    is_stock = model.text_length == STOCK_TEXT_LENGTH and not set(dropped) - {"t5"}
    if is_stock and by_size["shift"] is None:
        return StableDiffusion3Pipeline, {}
    return TunedSD3Pipeline, by_size | {"text_length": model.text_length, "dropped": " ".join(dropped)}


@dataclass(frozen=True)
class ReadSettings:
    """What a pipeline's folder says of a run beside its transformer.

    ``text_length`` is None where the folder does not say it.
    """

    text_length: int | None
    encoders: EncodersConfig
    diffusion: DiffusionConfig


def read_settings(folder: Path, name: str, diffusion: DiffusionConfig) -> ReadSettings:
    """Read a pipeline's folder.

    Args:
        name: that finds the folder again, in the run's configuration.
        diffusion: what the transformer says of it.

    Raises:
        UserError: a file is malformed, or a setting of the sampler is one that no run can have.
    """
    path = folder / MODEL_INDEX
    index: dict[str, Any] = read_json(path, OBJECT) if path.is_file() else {}
    said: dict[str, Any] = {
        key: check_value(index[key], SETTINGS[key], f"{key} in {path}")
        for key in ("text_length", "dropped", "shift", "shift_base_size")
        if key in index
    }
    if (folder / "scheduler" / "scheduler_config.json").is_file() and "scheduler" in index:
        diffusion = _read_sampler(load_pipeline_scheduler(folder), folder / "scheduler", diffusion)
    if said.get("shift") is not None and said.get("shift_base_size") is not None:
        diffusion = replace(diffusion, shift=said["shift"], shift_base_size=said["shift_base_size"])
    return ReadSettings(said.get("text_length"), _read_encoders(folder, name, said, index), diffusion)


def _read_sampler(scheduler: SchedulerMixin, where: Path, diffusion: DiffusionConfig) -> DiffusionConfig:
    """Take objective and shift from a sampler.

    Raises:
        UserError: it samples a model that no run trains; names the setting.
    """
    config: Mapping[str, Any] = scheduler.config
    uses_flow = bool(config.get("use_flow_sigmas"))
    is_flow = uses_flow or isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    for key, value in (FLOW_FIXED if is_flow else DDPM_FIXED).items():
        if key in config and config[key] != value:
            raise UserError(
                f"{where} has {key} {shown(config[key])}, but runs are trained with {shown(value)} alone; the imported model would "
                "be sampled as another one."
            )
    if not is_flow:
        return replace(diffusion, objective=Objective.ddpm)
    shift = float(config["flow_shift" if uses_flow else "shift"])
    return replace(diffusion, objective=Objective.rectified_flow, shift=shift)


def _read_encoders(folder: Path, name: str, said: dict[str, Any], index: dict[str, Any]) -> EncodersConfig:
    """Return the frozen encoders that come with a pipeline's folder."""
    encoders = EncodersConfig()
    if (folder / "text_encoder_2" / "config.json").is_file():
        encoders.text_encoder = name
        without_t5 = not (folder / "text_encoder_3").is_dir()
        encoders.dropped = said.get("dropped", "t5" if without_t5 else "").split()
    elif index.get("_class_name") == RecurrentSD3Pipeline.__name__ and not is_minilm(folder):
        encoders.text_encoder = name
    vae = folder / "vae" / "config.json"
    if vae.exists():
        values = read_config(vae, AUTOENCODERS)
        if values["_class_name"] != PixelCodec.__name__ or not _is_default_codec(values):
            encoders.autoencoder = name
    return encoders


def _is_default_codec(values: dict[str, Any]) -> bool:
    """Whether a pixel codec's configuration is that of ``encoders.autoencoder=pixel``."""
    default = PixelCodec().config
    return all(values.get(key, default[key]) == default[key] for key in ("scaling_factor", "shift_factor"))


def warn_of_sampler(folder: Path, config: ModelDescription) -> None:
    """Say what of a folder's sampler a run has no place for: exports sample by the run's own.

    It changes how images are made, not what the model is.
    """
    if not (folder / "scheduler" / "scheduler_config.json").is_file() or not (folder / MODEL_INDEX).is_file():
        return
    found, own = load_pipeline_scheduler(folder), build_scheduler(config)
    lost = [] if isinstance(found, type(own)) else [type(found).__name__]
    lost += [
        f"{key}={shown(value)}"
        for key, value in found.config.items()
        if not key.startswith("_") and type(found) is type(own) and own.config.get(key, value) != value
    ]
    if lost:
        logger.warning(
            "A run has no place for the sampler's %s; what is exported of it samples with %s as it is.",
            ", ".join(lost),
            type(own).__name__,
        )
