"""Images from prompts or class labels with a diffusers pipeline: its sampler, guidance interval and per-image noise."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)

import rmoe_megatron.hf as hf
from rmoe_megatron.errors import UserError

# StableDiffusion3Pipeline drops the unconditional half at a scale of 1 and cannot take it up again.
ALMOST_NO_GUIDANCE = 1.0 + 1.0e-6


def load_pipeline(folder: Path) -> DiffusionPipeline:
    """Load an exported folder, or any of diffusers', as a pipeline that shows no bar of its own.

    Raises:
        UserError: the folder is none, or carries code that only ``trust_remote_code`` would run.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(
            f"{folder} is not a diffusers folder (no model_index.json); make one with `rmoe convert to-hf`."
        )
    name = json.loads(index.read_text()).get("_class_name")
    if isinstance(name, list):
        raise UserError(
            f"{folder} was exported with --remote-code for users without this package; export it again without."
        )
    pipeline_class = getattr(hf, name, DiffusionPipeline)
    try:
        pipeline = pipeline_class.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder} cannot be loaded as a {name} ({reason}).") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def set_scheduler(pipeline: DiffusionPipeline, name: str) -> None:
    """Replace a pipeline's sampler by another one for the same objective.

    Args:
        name: ``euler`` (rectified flow), ``ddim`` (DDPM), or ``dpm`` (DPM-Solver++ of either).

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
    else:
        fitting = "euler and dpm" if is_flow else "ddim and dpm"
        raise UserError(f"--scheduler {name} does not fit this model; {fitting} do.")


def sample_images(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    steps: int,
    guidance: float,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
) -> np.ndarray:
    """Make one image per prompt; its noise depends on its own seed alone.

    Args:
        prompts: texts, or class labels for a class-conditional pipeline.
        guidance_interval: guide only where timestep / 1000 lies in it.
        progress: called with (images done, images in total).

    Returns:
        uint8 [N, H, W, 3].

    Raises:
        UserError: a class label is none of the model's.
    """
    arguments: dict[str, Any] = {"num_inference_steps": steps, "output_type": "np"}
    arguments |= _guidance(pipeline, guidance, guidance_interval)
    conditions = _conditions(pipeline, prompts)
    images = []
    if progress is not None:
        progress(0, len(prompts))
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[part]]
        result = pipeline(conditions[part], generator=generators, **arguments).images
        images.append((result * 255).round().astype(np.uint8))
        if progress is not None:
            progress(min(start + batch_size, len(prompts)), len(prompts))
    return np.concatenate(images)


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
