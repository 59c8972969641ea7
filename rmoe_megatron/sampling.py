"""Images from prompts or class labels with a diffusers pipeline: its sampler, guidance interval and per-image noise."""

import inspect
import logging
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)

from rmoe_megatron.config.buckets import Bucket
from rmoe_megatron.errors import UserError
from rmoe_megatron.launch import local_rank
from rmoe_megatron.pretrained.pipeline_folder import load_pipeline
from rmoe_megatron.processor import bf16_is_fast, product_seconds
from rmoe_megatron.refusal import refusal

__all__ = ["load_pipeline", "place_pipeline", "resolve_dtype", "sample_images", "set_scheduler"]

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# StableDiffusion3Pipeline drops the unconditional half at a scale of 1 and cannot take it up again.
ALMOST_NO_GUIDANCE = 1.0 + 1.0e-6


def resolve_dtype(name: str) -> str:
    """Return the data type that images are made in: ``auto`` is bf16 on a GPU, on a CPU the faster of bf16 and fp32.

    Raises:
        UserError: it is none of auto, fp32, fp16 and bf16.
    """
    if name == "auto":
        return "bf16" if torch.cuda.is_available() or bf16_is_fast() else "fp32"
    if name not in DTYPES:
        raise UserError(f"--dtype {name} must be auto, fp32, fp16 or bf16.")
    if name == "bf16" and not torch.cuda.is_available() and not bf16_is_fast():
        slower = product_seconds().bf16 / product_seconds().fp32
        logger.warning(
            "--dtype bf16 is slow here: a matrix product takes %.0f times as long as in fp32; --dtype auto would take fp32.",
            slower,
        )
    return name


def place_pipeline(pipeline: DiffusionPipeline, dtype: str) -> None:
    """Convert all of a pipeline's models to a data type of :func:`resolve_dtype`, and move them to this rank's GPU if it has one."""
    device = torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            # Not the pipeline's own to(), which warns once a model about layers to keep in float32, of which there are none.
            torch.nn.Module.to(component, device, DTYPES[dtype])


def set_scheduler(pipeline: DiffusionPipeline, name: str) -> None:
    """Replace a pipeline's sampler by another one for the same objective.

    Args:
        name: ``euler`` (rectified flow), ``ddim`` (DDPM), ``dpm`` (DPM-Solver++ of either), or the class of a scheduler of
            diffusers that does the model's objective (``FlowMatchHeunDiscreteScheduler``, ``UniPCMultistepScheduler``).

    Raises:
        UserError: the sampler is unknown or for the other objective.
    """
    config = pipeline.scheduler.config
    # The shift of a flow's sigmas, which DPM-Solver's configuration has under another name.
    shift = config.flow_shift if config.get("use_flow_sigmas", False) else config.get("shift")
    is_flow = shift is not None
    if name == "euler" and is_flow:
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    elif name == "dpm" and is_flow:
        pipeline.scheduler = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
    elif name == "ddim" and not is_flow:
        pipeline.scheduler = DDIMScheduler.from_config(config)
    elif name == "dpm":
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(config)
    elif name.endswith("Scheduler") and issubclass(getattr(diffusers, name, object), SchedulerMixin):
        pipeline.scheduler = _of_class(getattr(diffusers, name), config, shift)
    else:
        fitting = "euler and dpm" if is_flow else "ddim and dpm"
        raise UserError(
            f"--scheduler {name} does not fit this model; {fitting} and scheduler classes of diffusers do."
        )


def _of_class(scheduler_class: Any, config: Any, shift: float | None) -> SchedulerMixin:
    """Return a scheduler of any class of diffusers for the model's objective."""
    name, parameters = scheduler_class.__name__, inspect.signature(scheduler_class).parameters
    with refusal(f"--scheduler {name} cannot be made for this model"):
        if shift is None:
            if "prediction_type" not in parameters:
                raise UserError(
                    f"--scheduler {name} is none of a model that predicts noise; choose another one."
                )
            return scheduler_class.from_config(config)
        if "use_flow_sigmas" in parameters:
            return scheduler_class(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
        if "shift" not in parameters:
            raise UserError(
                f"--scheduler {name} is none of rectified flow, which this model is; choose another one."
            )
        return scheduler_class(shift=shift)


def sample_images(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    steps: int,
    guidance: float,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    negative_prompt: str | None = None,
    size: Bucket | None = None,
) -> np.ndarray:
    """Make one image per prompt; its noise depends on its own seed alone.

    Args:
        prompts: texts, or class labels for a class-conditional pipeline.
        negative_prompt: what guidance leads away from, instead of the empty text.
        guidance_interval: guide only where timestep / 1000 lies in it.
        size: of the images; None is the model's square.
        progress: called with (images done, images in total).

    Returns:
        uint8 [N, H, W, 3].

    Raises:
        UserError: a class label is none of the model's, the pipeline makes no images of this size, or its components do not fit
            together.
    """
    arguments: dict[str, Any] = {"num_inference_steps": steps, "output_type": "np"}
    arguments |= _guidance(pipeline, guidance, guidance_interval)
    if (
        negative_prompt is not None
        and "negative_prompt" not in inspect.signature(pipeline.__call__).parameters
    ):
        raise UserError(f"{type(pipeline).__name__} takes no negative prompt; leave --negative-prompt out.")
    if size is not None:
        _check_size(pipeline, size)
        arguments |= {"height": size.height, "width": size.width}
    conditions = _conditions(pipeline, prompts)
    images = []
    if progress is not None:
        progress(0, len(prompts))
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[part]]
        if negative_prompt is not None:
            arguments["negative_prompt"] = [negative_prompt] * len(generators)
        with refusal(f"The parts of {pipeline.name_or_path or 'the model'} do not fit together"):
            result = pipeline(conditions[part], generator=generators, **arguments).images
        images.append((result * 255).round().astype(np.uint8))
        if progress is not None:
            progress(min(start + batch_size, len(prompts)), len(prompts))
    return np.concatenate(images)


def _check_size(pipeline: DiffusionPipeline, size: Bucket) -> None:
    if "height" not in inspect.signature(pipeline.__call__).parameters:
        raise UserError(f"{type(pipeline).__name__} makes images of one size; leave --size out.")
    config = pipeline.transformer.config
    unit, most = pipeline.vae_scale_factor * config.patch_size, config.pos_embed_max_size
    if size.width % unit or size.height % unit or max(size.width, size.height) > unit * most:
        raise UserError(
            f"--size {size} is none of this model's: sides are multiples of {unit} pixels, {unit * most} at most."
        )


def _conditions(pipeline: DiffusionPipeline, prompts: list[str]) -> list[Any]:
    """Return the prompts as the pipeline takes them."""
    if "class_labels" not in inspect.signature(pipeline.__call__).parameters:
        return prompts
    classes = pipeline.transformer.config.num_embeds_ada_norm
    for prompt in prompts:
        if not prompt.isdigit() or int(prompt) >= classes:
            raise UserError(f"{prompt!r} is no class label; this model draws 0 to {classes - 1}.")
    return [int(prompt) for prompt in prompts]


def _guidance(pipeline: DiffusionPipeline, guidance: float, interval: tuple[float, float]) -> dict[str, Any]:
    """Return the pipeline's arguments for guidance in an interval of timesteps."""
    if interval == (0.0, 1.0):
        return {"guidance_scale": guidance}
    parameters = inspect.signature(pipeline.__call__).parameters
    if "guidance_interval" in parameters:
        return {"guidance_scale": guidance, "guidance_interval": interval}
    if "callback_on_step_end" not in parameters:
        raise UserError(f"{type(pipeline).__name__} has no guidance interval; leave --guidance-interval out.")

    def scale(timestep: float) -> float:
        return guidance if interval[0] <= timestep / 1000 <= interval[1] else ALMOST_NO_GUIDANCE

    def set_scale(pipe: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step + 1 < len(pipe.scheduler.timesteps):
            # diffusers documents this attribute for guidance that changes between steps.
            pipe._guidance_scale = scale(float(pipe.scheduler.timesteps[step + 1]))
        return tensors

    return {"guidance_scale": scale(1000.0), "callback_on_step_end": set_scale}
