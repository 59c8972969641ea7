"""Whether a run fits into the memory of its accelerators, asked before it starts; and where it does not, what would fit."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from rmoe_megatron.config.run import Device, Recompute, RunConfig
from rmoe_megatron.distributed.device import device_memory, runs_on_cuda
from rmoe_megatron.errors import UserError
from rmoe_megatron.planning.hardware import HARDWARE, Hardware
from rmoe_megatron.planning.plan import MEMORY_KINDS, USABLE, Plan, make_plan
from rmoe_megatron.planning.search import Misfit, accepted_layouts, largest_micro_batch

# What a remedy may change, in the order in which it is named.
CHANGED = ("training.micro_batch_size", "training.recompute", *(f"parallel.{name}" for name in (
    "tensor_model_parallel_size", "sequence_parallel", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
)))  # fmt: skip


def hardware_here(device: Device) -> Hardware | None:
    """Return the GPU that a run on this machine would have, None where it would have none; rates are not known of it."""
    if not runs_on_cuda(device):
        return None
    memory = device_memory(torch.device("cuda", 0))
    return replace(HARDWARE["h100"], name=torch.cuda.get_device_name(0), memory=memory)


def check_fit(
    config: RunConfig,
    ranks: int,
    hardware: Hardware,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Check that a valid run of ``ranks`` accelerators has the memory that it needs, and return a sentence that says what takes it.

    One rank of every pipeline stage takes a step on tensors without values, which takes seconds. Where the plan does not know the run
    (its engine, its precision, several sizes of picture) the sentence says so.

    Args:
        progress: of looking for a layout that fits, if the run does not.

    Raises:
        UserError: it does not fit; names what it would need.
    """
    config = replace(config, device=Device.cpu)  # the plan puts the kernels of a GPU in place itself
    try:
        plan = make_plan(config, ranks, hardware, ranks_per_node=8)
    except UserError as unknown:
        return f"memory is not counted: {unknown}"
    has = f"of the {hardware.memory / 1e9:.0f} GB of {hardware.name} {USABLE * hardware.memory / 1e9:.1f} can be used"
    if plan.fits:
        return f"memory of the fullest rank: {_by_kind(plan)}; {has}"
    raise UserError(
        f"The run needs more memory than there is: on its fullest rank {_by_kind(plan)}, and {has}; "
        f"{_remedy(config, ranks, hardware, progress)}."
    )


def _by_kind(plan: Plan) -> str:
    fullest = max(plan.stages, key=lambda stage: stage.peak)
    parts = " + ".join(f"{kind} {getattr(fullest, kind) / 1e9:.2f}" for kind in MEMORY_KINDS)
    return f"{parts} = {fullest.peak / 1e9:.2f} GB"


def _remedy(config: RunConfig, ranks: int, hardware: Hardware, progress: Callable[[int, int], None]) -> str:
    """Return settings with which the run would fit on the same accelerators, or what the smallest layout needs.

    Layouts are tried by how much they change: smaller micro-batches first, then recomputation, then a model spread over more ranks.
    """
    layouts = sorted(
        (each for each in accepted_layouts(config, ranks) if _spread(each) >= _spread(config)),
        key=lambda each: _changes(config, each),
    )
    smallest: Misfit | None = None
    for done, layout in enumerate(layouts):
        progress(done, len(layouts))
        found = largest_micro_batch(layout, ranks, hardware)
        if not isinstance(found, Misfit):
            progress(len(layouts), len(layouts))
            return f"it fits with `{' '.join(_settings(config, found))}`"
        if smallest is None or found.needed < smallest.needed:
            smallest = found
    more = f"take more or larger GPUs (`rmoe plan CONFIG --gpus {2 * ranks} --search`), or train less of the model"
    if smallest is None:
        return more
    return f"the smallest layout of {ranks} needs {smallest.needed / 1e9:.1f} GB: {more}"


def _spread(config: RunConfig) -> int:
    return config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size


def _changes(config: RunConfig, other: RunConfig) -> tuple[int, int, int, int]:
    """Return what a layout is sorted by: over how many ranks it spreads a model, sizes that differ, pipeline stages, recomputation."""
    sizes = [key for key in CHANGED if key.endswith("parallel_size")]
    differ = sum(_value(config, key) != _value(other, key) for key in sizes)
    stages = other.parallel.pipeline_model_parallel_size
    return _spread(other), differ, stages, list(Recompute).index(other.training.recompute)


def _settings(config: RunConfig, other: RunConfig) -> list[str]:
    return [f"{key}={_value(other, key)}" for key in CHANGED if _value(config, key) != _value(other, key)]


def _value(config: RunConfig, key: str) -> Any:
    """Return the value of a key of two parts as an override writes it."""
    section, name = key.split(".")
    value = getattr(getattr(config, section), name)
    return str(value).lower() if isinstance(value, bool) else getattr(value, "value", value)
