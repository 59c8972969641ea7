"""Images from prompts or class labels with a diffusers pipeline: its sampler, guidance interval and per-image noise."""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
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
from torch import Tensor

from rmoe_megatron.config.buckets import Bucket
from rmoe_megatron.distributed.device import inference_device
from rmoe_megatron.distributed.launch import local_rank, world_size
from rmoe_megatron.distributed.processor import bf16_is_fast, product_seconds
from rmoe_megatron.errors import UserError
from rmoe_megatron.files.foreign_errors import refusal
from rmoe_megatron.pretrained.finite import require_finite
from rmoe_megatron.pretrained.pipeline_folder import load_pipeline, load_pipeline_scheduler

__all__ = [
    "describe_place",
    "load_sampler",
    "load_pipeline",
    "open_pipeline",
    "resolve_dtype",
    "sample_images",
    "set_scheduler",
]

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

OTHER_DTYPE = "choose another --dtype (fp16 ends at 65504), or other weights if they are not finite in any"
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


def open_pipeline(
    folder: Path, dtype: str, scheduler: str | None = None, compile_transformer: bool = False
) -> DiffusionPipeline:
    """Load a diffusers folder to make images with it on this rank's device; everything that samples does it by this function.

    Args:
        dtype: the data type of all its models, as :func:`resolve_dtype` gives it.
        scheduler: the sampler, as :func:`set_scheduler` takes it; None keeps the folder's.
        compile_transformer: run the transformer through torch.compile.

    Raises:
        UserError: the folder holds no pipeline, a model of it holds values that ``dtype`` does not, the sampler does not fit, or there are
            fewer GPUs than ranks on this host.
    """
    device = inference_device(local_rank())  # before a folder of gigabytes is read
    pipeline = load_pipeline(folder)
    if scheduler is not None:
        set_scheduler(pipeline, scheduler)
    place_pipeline(pipeline, dtype, device)
    if compile_transformer:
        pipeline.transformer = torch.compile(pipeline.transformer)
    return pipeline


def place_pipeline(pipeline: DiffusionPipeline, dtype: str, device: torch.device) -> None:
    """Convert a pipeline's models to a data type of :func:`resolve_dtype` and move them to a device.

    Raises:
        UserError: a model holds values that the data type does not.
    """
    models = {name: each for name, each in pipeline.components.items() if isinstance(each, torch.nn.Module)}
    for model in models.values():
        convert_model(model, DTYPES[dtype])
    if device.type != "cpu":  # after the conversion: float32 may need twice the memory that there is
        pipeline.to(device)
    for name, model in models.items():
        where = f"{name} of {pipeline.name_or_path or 'the model'}"
        require_finite(model.state_dict().items(), where, dtype, OTHER_DTYPE)


def convert_model(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Convert a model's floating-point weights in place, but those that its class keeps in float32.

    The output projections of T5's feed-forward layers are such: their products exceed what float16 holds.
    """
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype is torch.float16:  # transformers' own rule: bfloat16 has float32's range
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            is_kept = not kept.isdisjoint(name.split("."))
            tensor.data = tensor.data.to(torch.float32 if is_kept else dtype)


def describe_place(dtype: str) -> str:
    """Return where this job makes its images, and in which data type, as ``on GPU 0 in bf16``."""
    device = inference_device(local_rank())
    where = "on the CPU" if device.type == "cpu" else f"on GPU {device.index}"
    shared = f", each of {world_size()} ranks a part" if world_size() > 1 else ""
    if shared and device.type == "cuda":
        where = "on the GPUs"
    return f"{where} in {dtype}{shared}"


def load_sampler(folder: Path, name: str | None) -> SchedulerMixin:
    """Return the sampler that :func:`open_pipeline` gives to a folder's pipeline, without loading any model.

    Raises:
        UserError: the folder holds no pipeline, or the sampler does not fit it.
    """
    sampler = load_pipeline_scheduler(folder)
    return sampler if name is None else make_sampler(name, sampler.config)


def set_scheduler(pipeline: DiffusionPipeline, name: str) -> None:
    """Replace a pipeline's sampler by another one for the same objective; see :func:`make_sampler`."""
    pipeline.scheduler = make_sampler(name, pipeline.scheduler.config)


def make_sampler(name: str, config: Any) -> SchedulerMixin:
    """Return another sampler for the objective of a model.

    Args:
        name: ``euler`` (rectified flow), ``ddim`` (DDPM), ``dpm`` (DPM-Solver++ of either), or the class of a scheduler of
            diffusers that does the model's objective (``FlowMatchHeunDiscreteScheduler``, ``UniPCMultistepScheduler``).
        config: the configuration of the model's own sampler.

    Raises:
        UserError: the sampler is unknown or for the other objective.
    """
    # The shift of a flow's sigmas, which DPM-Solver's configuration has under another name.
    shift = config.flow_shift if config.get("use_flow_sigmas", False) else config.get("shift")
    is_flow = shift is not None
    if name == "euler" and is_flow:
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    if name == "dpm" and is_flow:
        return DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
    if name == "ddim" and not is_flow:
        return DDIMScheduler.from_config(config)
    if name == "dpm":
        return DPMSolverMultistepScheduler.from_config(config)
    if name.endswith("Scheduler") and issubclass(getattr(diffusers, name, object), SchedulerMixin):
        return _of_class(getattr(diffusers, name), config, shift)
    fitting = "euler and dpm" if is_flow else "ddim and dpm"
    raise UserError(
        f"--scheduler {name} does not fit this model; {fitting} and scheduler classes of diffusers do."
    )


def set_depth(pipeline: DiffusionPipeline, depth: int) -> None:
    """Have a model pass its loop ``depth`` times, or take so many latent steps; it may have been trained with another number.

    Raises:
        UserError: the model has neither a loop nor a recurrence of which the pipeline knows.
    """
    transformer = pipeline.transformer
    if not hasattr(transformer, "set_depth"):
        raise UserError(
            f"--depth is for models with a loop or a recurrence; {type(transformer).__name__} has none."
        )
    try:
        transformer.set_depth(depth)
    except ValueError as error:
        raise UserError(f"--depth {depth} does not fit: {error}") from error


def _of_class(scheduler_class: Any, config: Any, shift: float | None) -> SchedulerMixin:
    """Return a scheduler of any class of diffusers for the model's objective."""
    name, parameters = scheduler_class.__name__, inspect.signature(scheduler_class).parameters
    if "noise_sampler_seed" in parameters:
        raise UserError(
            f"--scheduler {name} draws noise of its own that no image's seed reaches; choose another one."
        )
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
    """Make one image per prompt; its noise, that of a stochastic sampler's steps too, depends on its own seed alone.

    Images of a batch are made together. Whatever the batch, an image is the same but for the last bit of matrix products, whose
    kernels differ with the number of rows.

    Args:
        prompts: texts, or class labels for a class-conditional pipeline.
        negative_prompt: what guidance leads away from, instead of the empty text.
        guidance_interval: guide only where timestep / 1000 lies in it.
        size: the images' size; None is the model's square.
        progress: called with (images done, images in total).

    Returns:
        uint8 [N, H, W, 3].

    Raises:
        UserError: a class label is none of the model's, the pipeline makes no images of this size or has no such guidance, its
            components do not fit together, or an image has values that are not finite.
    """
    arguments: dict[str, Any] = {"num_inference_steps": steps, "output_type": "np"}
    arguments |= _guidance(pipeline, guidance, guidance_interval)
    last: dict[str, Tensor] = {}  # latents of the last step
    if "callback_on_step_end" in inspect.signature(pipeline.__call__).parameters:
        arguments["callback_on_step_end"] = _keep_latents(last, arguments.get("callback_on_step_end"))
    if (
        negative_prompt is not None
        and "negative_prompt" not in inspect.signature(pipeline.__call__).parameters
    ):
        raise UserError(f"{type(pipeline).__name__} takes no negative prompt; leave --negative-prompt out.")
    if size is not None:
        _check_size(pipeline, size)
        arguments |= {"height": size.height, "width": size.width}
    conditions = conditions_of(pipeline, prompts)
    images = []
    if progress is not None:
        progress(0, len(prompts))
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[part]]
        if negative_prompt is not None:
            arguments["negative_prompt"] = [negative_prompt] * len(generators)
        parts = refusal(f"The parts of {pipeline.name_or_path or 'the model'} do not fit together")
        with parts, seeded_steps(pipeline.scheduler, generators):
            result = pipeline(conditions[part], generator=generators, **arguments).images
        _check_images(pipeline, result, last.get("latents"), prompts[part])
        images.append((result * 255).round().astype(np.uint8))
        if progress is not None:
            progress(min(start + batch_size, len(prompts)), len(prompts))
    return np.concatenate(images)


def _keep_latents(last: dict[str, Tensor], other: Callable[..., Any] | None) -> Callable[..., Any]:
    """Return a diffusers callback that keeps the latents of the latest step, and calls another one."""

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        last["latents"] = tensors["latents"]
        return other(pipe, step, timestep, tensors) if other is not None else tensors

    return keep


def _check_images(
    pipeline: DiffusionPipeline, images: np.ndarray, latents: Tensor | None, prompts: list[str]
) -> None:
    """Refuse images [N, H, W, 3] that are not finite, which would be black, or whose latents [N, C, h, w] are not.

    Clamping to [0, 1] turns infinite values of decoded latents into white.
    """
    finite = np.isfinite(images).all(axis=(1, 2, 3))
    if latents is not None:
        finite &= latents.isfinite().flatten(1).all(dim=1).cpu().numpy()
    if not finite.all():
        first = prompts[int(np.argmin(finite))]
        raise UserError(
            f"{pipeline.name_or_path or 'The model'} makes {int((~finite).sum())} of {len(finite)} images with values that are not "
            f"finite, of {first!r:.80} for one; choose --dtype bf16 or fp32, less --guidance, or weights that have not diverged."
        )


@contextmanager
def seeded_steps(scheduler: Any, generators: list[torch.Generator]) -> Iterator[None]:
    """Let a stochastic sampler draw the noise of its steps from the generators of the images, not from the process's.

    The pipelines of diffusers call ``step`` without a generator. DiTPipeline puts a batch that is guided in twice.
    """
    step = scheduler.step
    if "generator" not in inspect.signature(step).parameters:
        yield
        return

    def seeded(output: Any, timestep: Any, sample: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        named["generator"] = generators * (len(sample) // len(generators))
        return step(output, timestep, sample, *arguments, **named)

    scheduler.step = seeded
    try:
        yield
    finally:
        del scheduler.step  # the class's own is there again


def _check_size(pipeline: DiffusionPipeline, size: Bucket) -> None:
    if "height" not in inspect.signature(pipeline.__call__).parameters:
        raise UserError(f"{type(pipeline).__name__} makes images of one size; leave --size out.")
    config = pipeline.transformer.config
    unit, most = pipeline.vae_scale_factor * config.patch_size, config.pos_embed_max_size
    if size.width % unit or size.height % unit or max(size.width, size.height) > unit * most:
        raise UserError(
            f"--size {size} is none of this model's: sides are multiples of {unit} pixels, {unit * most} at most."
        )


def conditions_of(pipeline: DiffusionPipeline, prompts: list[str]) -> list[Any]:
    """Return the prompts as the pipeline takes them.

    Raises:
        UserError: one is no class label of a class-conditional pipeline.
    """
    if "class_labels" not in inspect.signature(pipeline.__call__).parameters:
        return prompts
    classes = pipeline.transformer.config.num_embeds_ada_norm
    for prompt in prompts:
        if not prompt.isdigit() or int(prompt) >= classes:
            raise UserError(f"{prompt!r} is no class label; this model draws 0 to {classes - 1}.")
    return [int(prompt) for prompt in prompts]


def _guidance(pipeline: DiffusionPipeline, guidance: float, interval: tuple[float, float]) -> dict[str, Any]:
    """Return the pipeline's arguments for guidance in an interval of timesteps."""
    parameters = inspect.signature(pipeline.__call__).parameters
    if guidance < 1 and "guidance_interval" not in parameters:
        raise UserError(
            f"{type(pipeline).__name__} guides at scales above 1 alone and would take --guidance {guidance:g} for 1; give 1 or more."
        )
    if interval == (0.0, 1.0):
        return {"guidance_scale": guidance}
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
