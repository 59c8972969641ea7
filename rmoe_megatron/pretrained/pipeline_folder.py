"""A pipeline's folder, component by component: what model_index.json names is among known classes, or is not loaded."""

import inspect
from pathlib import Path
from typing import Annotated, Any

import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    SchedulerMixin,
    StableDiffusion3Pipeline,
)
from pydantic import Field, TypeAdapter
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rmoe_megatron.config.model import ModelDescription
from rmoe_megatron.errors import UserError
from rmoe_megatron.files.foreign_errors import refusal
from rmoe_megatron.files.untrusted import check_value, read_json, shown
from rmoe_megatron.hf.dit_pipeline import RecurrentDiTPipeline
from rmoe_megatron.hf.pipeline import RecurrentSD3Pipeline
from rmoe_megatron.hf.pixel_codec import PixelCodec
from rmoe_megatron.hf.tuned_sd3_pipeline import TunedSD3Pipeline
from rmoe_megatron.model.checks import check_described_model
from rmoe_megatron.pretrained.architecture import (
    CLASSES,
    FORMER_DIT,
    empty_transformer,
    read_architecture,
    read_transformer_config,
)
from rmoe_megatron.pretrained.config_files import OBJECT
from rmoe_megatron.pretrained.hub import is_repository, model_folder
from rmoe_megatron.pretrained.loading import (
    check_class,
    load_autoencoder_folder,
    load_diffusers_model,
    load_scheduler,
    load_text_encoder_folder,
    load_tokenizer,
    without_warnings,
)
from rmoe_megatron.pretrained.model_files import MODEL_INDEX, pipeline_parts
from rmoe_megatron.pretrained.safetensors_folder import SafetensorsFolder, check_tensors

PIPELINES: dict[str, type[DiffusionPipeline]] = {
    cls.__name__: cls
    for cls in (
        RecurrentSD3Pipeline,
        RecurrentDiTPipeline,
        TunedSD3Pipeline,
        StableDiffusion3Pipeline,
        DiTPipeline,
    )
}
COMPONENTS: dict[str, dict[str, type]] = {
    "transformer": CLASSES | {FORMER_DIT: DiTTransformer2DModel},
    "vae": {cls.__name__: cls for cls in (AutoencoderKL, PixelCodec)},
    "scheduler": {
        cls.__name__: cls
        for cls in (
            FlowMatchEulerDiscreteScheduler,
            DPMSolverMultistepScheduler,
            DDPMScheduler,
            DDIMScheduler,
        )
    },
}
IMAGENET_CLASSES = 1000  # diffusers' DiTPipeline takes this number for the dropped label
# SD3 can do without T5: zeros stand for it.
NEEDED = {*COMPONENTS, "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"}
PAIR = TypeAdapter(Annotated[list[str | None], Field(min_length=2, max_length=2)])
# What else a pipeline takes from model_index.json.
SETTINGS: dict[str, TypeAdapter[Any]] = {
    "text_length": TypeAdapter(Annotated[int, Field(ge=1, le=1 << 16)]),
    "dropped": TypeAdapter(Annotated[str, Field(pattern=r"^((clip_l|clip_g|t5)( |$)){0,3}$")]),
    "shift": TypeAdapter(Annotated[float, Field(gt=0, le=1000)] | None),
    "shift_base_size": TypeAdapter(Annotated[int, Field(ge=1, le=4096)] | None),
    "id2label": TypeAdapter(dict[str, str] | None),
}


def pipeline_folder(name: Path) -> Path:
    """Return the local folder of a pipeline.

    Args:
        name: a local folder, or a repository of the hub, which is downloaded where the hub's cache lacks it.

    Raises:
        UserError: there is none.
    """
    folder = model_folder(str(name), pipeline_parts) if is_repository(str(name)) else name
    if not (folder / MODEL_INDEX).exists():
        raise UserError(
            f"{folder} is not a diffusers folder (no {MODEL_INDEX}); make one with `rmoe convert to-hf`."
        )
    return folder


def load_pipeline(folder: Path) -> DiffusionPipeline:
    """Load an exported folder, or diffusers' own of Stable Diffusion 3 or DiT, as a pipeline without a bar of its own.

    Args:
        folder: a local one, or the name of a repository of the hub.

    Raises:
        UserError: the folder is none, names a class that is not known here, carries code that only
            ``trust_remote_code`` would run, or a file in it is malformed.
    """
    folder = pipeline_folder(folder)
    path = folder / MODEL_INDEX
    index = read_json(path, OBJECT)
    name = index.get("_class_name")
    if isinstance(name, list):
        raise UserError(
            f"{folder} was exported with --remote-code for users without this package; export it again without."
        )
    if not isinstance(name, str) or name not in PIPELINES:
        raise UserError(f"{path} describes a {shown(name)}; supported are {', '.join(PIPELINES)}.")
    parameters = inspect.signature(PIPELINES[name].__init__).parameters
    parts = {key: value for key, value in index.items() if not key.startswith("_")}
    arguments: dict[str, Any] = {}
    for key, value in parts.items():
        if key in SETTINGS and key in parameters:
            arguments[key] = check_value(value, SETTINGS[key], f"{key} in {path}")
        elif key in parameters or isinstance(value, list):
            arguments[key] = _component_class(path, key, value)
    unknown = sorted(key for key, found in arguments.items() if key not in parameters and found is not None)
    if unknown:
        raise UserError(f"{path} names the component {unknown[0]}, which a {name} does not have.")
    for key, parameter in parameters.items():
        if key not in ("self", *arguments) and parameter.default is parameter.empty:
            raise UserError(f"{path} has no value for {key}, which a {name} needs.")
    loaded = {
        key: value if key in SETTINGS else _load_component(folder / key, key, value)
        for key, value in arguments.items()
        if key in parameters
    }
    pipeline_class = PIPELINES[name]
    if pipeline_class is DiTPipeline and loaded["transformer"].config.num_embeds_ada_norm != IMAGENET_CLASSES:
        pipeline_class = RecurrentDiTPipeline  # diffusers' takes label 1000 for the dropped one
        loaded.pop("id2label", None)
    with refusal(f"{folder} cannot be loaded as a {name}"):
        pipeline = pipeline_class(**loaded)
        pipeline.register_to_config(_name_or_path=str(folder))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_pipeline_scheduler(folder: Path) -> SchedulerMixin:
    """Return the sampler of a diffusers folder alone.

    Raises:
        UserError: the folder is none, or the sampler's file is malformed.
    """
    folder = pipeline_folder(folder)
    path = folder / MODEL_INDEX
    found = _component_class(path, "scheduler", read_json(path, OBJECT).get("scheduler"))
    assert found is not None  # no pipeline goes without
    return load_scheduler(folder / "scheduler", found)


def _component_class(path: Path, key: str, value: object) -> type | None:
    """Return the class that an entry [library, class] of model_index.json names, None for [null, null]."""
    library, name = check_value(value, PAIR, f"{key} in {path}")
    known = COMPONENTS.get(key)
    if library is None and name is None and key not in NEEDED:
        return None
    found = None
    if library is not None and name is not None:
        found = known.get(name) if known is not None else _transformers_class(key, name)
    if found is None or library != _library(found):
        allowed = ", ".join(known) if known is not None else "encoders and tokenizers of transformers"
        raise UserError(f"{path} has {key} {shown(value)}; supported are {allowed}.")
    return found


def _transformers_class(key: str, name: str) -> type | None:
    """Return transformers' public class of a name if it is what a component of this name can be."""
    base = {"text": PreTrainedModel, "tokenizer": PreTrainedTokenizerBase}.get(key.partition("_")[0])
    if base is None or not name.isidentifier() or name.startswith("_"):
        return None
    with refusal(f"transformers has no usable {name}"):
        found = getattr(transformers, name, None)
    return found if isinstance(found, type) and issubclass(found, base) else None


def _library(cls: type) -> str:
    """Return what model_index.json calls the library of a class."""
    top = cls.__module__.partition(".")[0]
    return top if top in ("diffusers", "transformers") else cls.__module__


def _load_component(folder: Path, key: str, cls: type | None) -> Any:
    if cls is None:
        return None
    if key == "transformer":
        return _load_transformer(folder, cls)
    if key == "vae":
        return load_autoencoder_folder(folder, cls)
    if key == "scheduler":
        return load_scheduler(folder, cls)
    if key.startswith("tokenizer"):
        return load_tokenizer(folder)
    return load_text_encoder_folder(folder, cls, dtype=None)


def _load_transformer(folder: Path, transformer_class: type[ModelMixin]) -> ModelMixin:
    """Load a transformer after the checks of an import."""
    path = folder / "config.json"
    check_class(read_transformer_config(path), transformer_class, folder)
    architecture = read_architecture(folder, text_length=1)
    config = ModelDescription(
        model=architecture.model,
        recurrence=architecture.recurrence,
        loop=architecture.loop,
        diffusion=architecture.diffusion,
    )
    check_described_model(config, str(path))
    empty = empty_transformer(config)
    check_tensors(SafetensorsFolder(folder), empty, str(folder))
    with without_warnings():  # of keys that the class does not know
        return load_diffusers_model(folder, transformer_class, empty)
