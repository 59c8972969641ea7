"""Time, memory and kernels of training steps."""

import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmark_step import Step, diffusers_step, engine_step, measure
from gpu_check_workplace import (
    PIXELS_PER_LATENT,
    Figures,
    Workplace,
    fitting,
    recurrence_of,
    require_compiler,
    run_config,
    speed_model,
    with_fp8,
    with_size,
)
from tensor_memory import peak_tensor_bytes
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from rmoe_megatron.config.run import Backend, Fp8Recipe, Precision, RunConfig
from rmoe_megatron.distributed.device import device_memory, peak_flops, synchronize
from rmoe_megatron.engine.protocol import Engine
from rmoe_megatron.engine.synchronisation import ALLOWED, Recorder
from rmoe_megatron.files import atomic
from rmoe_megatron.model.flops import training_flops_per_sample

# Modules M and latent steps T.
VARIANTS = {"dense": None, "dense_compiled": None, "m2_t2": (2, 2), "m5_t5": (5, 5)}
TIMELINE = "gpu_check_timeline.json"
TOP = 20  # operations of the table


@dataclass
class SizeFigures:
    """Steps of one model at one image size."""

    pixels: int  # of a side
    batch: int
    seconds: float  # of a step, median
    flops: float  # of a step, forward and backward
    tflops: float  # a second
    mfu: float | None  # of the device's bf16 peak, where that is known
    step_gb: float  # tensors that a step adds to weights, gradients and optimizer state
    peak_gb: float | None  # all tensors on the GPU

    @property
    def seconds_per_sample(self) -> float:
        """Return what makes steps of different batches comparable."""
        return self.seconds / self.batch


def speed_config(workplace: Workplace, variant: str) -> RunConfig:
    """Return the run of SD3-medium in bf16: dense, dense through torch.compile, or recurrent."""
    config = run_config(speed_model(workplace.small), Precision.bf16, workplace.device, 1)
    settings = VARIANTS[variant]
    compiled = variant == "dense_compiled"
    return replace(
        config,
        # Transformer Engine's layers are not traced.
        backend=Backend.local if compiled else config.backend,
        recurrence=settings and recurrence_of(*settings, small=workplace.small),
        training=replace(config.training, compile=compiled),
    )


def speed(workplace: Workplace, variant: str) -> Figures:
    """Measure a variant at its sizes; a recurrent one also against the dense one, in time over FLOPs."""
    config = speed_config(workplace, variant)
    if config.training.compile:
        require_compiler(workplace)
    found = measured(workplace, variant, config)
    figures: Figures = {"sizes": [asdict(each) for each in found]}
    if config.recurrence is None:
        return figures
    dense_config = speed_config(workplace, "dense")
    for mine, dense in zip(found, measured(workplace, "dense", dense_config), strict=True):
        tokens = _tokens(config, mine.pixels // PIXELS_PER_LATENT)
        time_ratio = mine.seconds_per_sample / dense.seconds_per_sample
        flop_ratio = training_flops_per_sample(config, tokens) / training_flops_per_sample(
            dense_config, tokens
        )
        figures[f"time_over_flops_{mine.pixels}"] = time_ratio / flop_ratio
    return figures


def speed_fp8(workplace: Workplace, recipe: Fp8Recipe) -> Figures:
    """Measure the dense model with an FP8 recipe, and how many times faster than in bf16 it is at the larger size."""
    dense = speed_config(workplace, "dense")
    bf16 = measured(workplace, "dense", dense)[-1]
    # Products in FP8 take tokens by the multiple of 16, whatever batch has fitted.
    length = -(-dense.model.text_length // 16) * 16
    padded = replace(dense, model=replace(dense.model, text_length=length))
    mine = measured(workplace, f"fp8_{recipe.value}", with_fp8(padded, recipe))
    return {
        "sizes": [asdict(each) for each in mine],
        "text_length": length,
        "speed_over_bf16": bf16.seconds_per_sample / mine[-1].seconds_per_sample,
    }


def measured(workplace: Workplace, name: str, config: RunConfig) -> list[SizeFigures]:
    """Return the figures of a model at half the size, unless it is compiled, and at the whole; measured once."""
    if name not in workplace.measured:
        engine, side = workplace.trainer(name, config), config.model.sample_size
        batch = _first_batch(workplace)
        found = [fitting(batch, partial(_at_size, workplace, engine, config, side))]
        if not config.training.compile:  # another size is compiled anew, for a minute
            # Half the side is a quarter of the tokens.
            found.insert(0, fitting(4 * batch, partial(_at_size, workplace, engine, config, side // 2)))
        workplace.measured[name] = found
    return workplace.measured[name]


def _at_size(workplace: Workplace, engine: Engine, config: RunConfig, side: int, batch: int) -> SizeFigures:
    """Measure steps on latents of ``side``."""
    device = workplace.device
    step = engine_step(engine, with_size(config, side, batch), device)
    seconds = _median(workplace, step)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    step_bytes = peak_tensor_bytes(lambda: step(0), device)
    flops = batch * training_flops_per_sample(config, _tokens(config, side))
    peak = peak_flops(device)
    return SizeFigures(
        pixels=side * PIXELS_PER_LATENT,
        batch=batch,
        seconds=seconds,
        flops=flops,
        tflops=flops / seconds / 1e12,
        mfu=flops / seconds / peak if peak else None,
        step_gb=step_bytes / 1e9,
        peak_gb=None if before is None else (before + step_bytes) / 1e9,
    )


def _first_batch(workplace: Workplace) -> int:
    """Return how many images of 1024 pixels to try first: weights and optimizer take 37 GB, an image about 8."""
    if workplace.small:
        return 2
    return 8 if device_memory(workplace.device) > 100e9 else 4


def _tokens(config: RunConfig, side: int) -> int:
    return (side // config.model.patch_size) ** 2


def _median(workplace: Workplace, step: Step) -> float:
    return measure({"step": step}, 2 if workplace.small else 5, workplace.device)["step"]


def against_diffusers(workplace: Workplace) -> Figures:
    """Measure the step of diffusers' model, compiled, beside the dense model's at the larger size, compiled as well."""
    require_compiler(workplace)
    config = speed_config(workplace, "dense")
    ours = measured(workplace, "dense_compiled", speed_config(workplace, "dense_compiled"))[-1]
    workplace.release()

    def at_batch(batch: int) -> tuple[int, float, float]:
        sized = with_size(config, config.model.sample_size, batch)
        step = diffusers_step(sized, workplace.device, compile=True)
        started = time.perf_counter()
        step(0)
        synchronize(workplace.device)
        return batch, time.perf_counter() - started, _median(workplace, step)

    batch, first, seconds = fitting(ours.batch, at_batch)
    torch.compiler.reset()  # what it keeps of the model
    workplace.release()
    return {
        "pixels": ours.pixels,
        "batch": batch,
        "seconds": seconds,
        "first_step_seconds": first,  # with compiling
        "our_seconds": ours.seconds,
        "our_batch": ours.batch,
        "diffusers_over_ours": seconds / batch / ours.seconds_per_sample,
    }


def timeline(workplace: Workplace) -> Figures:
    """Record two steps of the model with M=2, T=2 as a Chrome trace, and their dearest operations."""
    step = _recurrent_step(workplace)
    activities = [ProfilerActivity.CPU]
    if workplace.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    started = time.perf_counter()
    with profile(activities=activities) as recorded:
        for index in range(2):
            step(index)
        synchronize(workplace.device)
        seconds = time.perf_counter() - started
    with atomic.writing(workplace.folder / TIMELINE) as partly:
        recorded.export_chrome_trace(str(partly))
    operations = dearest(recorded.key_averages(), workplace.device)
    busy = sum(each["seconds"] for each in operations)
    return {
        "trace": TIMELINE,
        "seconds": seconds,
        "busy": busy / seconds,  # of the device; recording slows the CPU down, so a lower bound
        "operations": operations[:TOP],
    }


def dearest(averages: Any, device: torch.device) -> list[Figures]:
    """Return operations with calls and seconds of their own on the device, those of most seconds first."""
    clock = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = [
        {"name": each.key, "calls": each.count, "seconds": getattr(each, clock) / 1e6}
        for each in averages
        # On a GPU its kernels only: what launches them, or spans several, has their time as well.
        if device.type == "cpu" or (each.device_type == DeviceType.CUDA and not each.is_user_annotation)
    ]
    return sorted((row for row in rows if row["seconds"] > 0), key=lambda row: -row["seconds"])


def synchronisations(workplace: Workplace) -> Figures:
    """Find where a step of the model with M=2, T=2 waits for the device: at listed places, and on a GPU as CUDA itself says.

    Raises:
        RuntimeError: at a place that is not listed.
    """
    step = _recurrent_step(workplace)
    with Recorder().recording() as recorder:
        step(1)
    places = {place: dict(asked) for place, asked in recorder.found.items()}
    if unlisted := places.keys() - ALLOWED.keys():
        raise RuntimeError(
            f"a step waits for the device at places that are not listed: {', '.join(sorted(unlisted))}"
        )
    if workplace.device.type == "cpu":
        return {"places": places}
    torch.cuda.set_sync_debug_mode("warn")
    try:
        warned = warning_places(lambda: step(2), "called a synchronizing CUDA operation")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"places": places, "count": warned.total(), "warnings": dict(warned.most_common())}


def warning_places(action: Callable[[], object], message: str) -> Counter[str]:
    """Run ``action`` and count the warnings that have ``message`` by folder, file and line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return Counter(
        f"{'/'.join(Path(each.filename).parts[-2:])}:{each.lineno}"
        for each in caught
        if message in str(each.message)
    )


def _recurrent_step(workplace: Workplace) -> Step:
    """Return a step of the model with M=2, T=2, on a batch that has fitted, taken once."""
    config = speed_config(workplace, "m2_t2")
    batch = measured(workplace, "m2_t2", config)[-1].batch
    sized = with_size(config, config.model.sample_size, batch)
    step = engine_step(workplace.trainer("m2_t2", config), sized, workplace.device)
    step(0)
    synchronize(workplace.device)
    return step
