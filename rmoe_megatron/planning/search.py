"""Looks for the layout that trains fastest on some accelerators among those that a run would accept and that fit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from rmoe_megatron.config.layout_checks import data_parallel_size
from rmoe_megatron.config.run import Recompute, RunConfig
from rmoe_megatron.config.validation import validate
from rmoe_megatron.errors import UserError
from rmoe_megatron.planning.dry_run import dry_run
from rmoe_megatron.planning.hardware import Hardware
from rmoe_megatron.planning.plan import USABLE, Plan, make_plan

MOST_TENSOR, MOST_PIPELINE, MOST_MICRO_BATCH = 8, 8, 64


@dataclass(frozen=True)
class Misfit:
    """A layout that does not fit: its configuration, and the bytes of its first stage with micro-batches of one sample."""

    config: RunConfig
    needed: float


def search(
    config: RunConfig,
    ranks: int,
    hardware: Hardware,
    ranks_per_node: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Plan], list[Misfit]]:
    """Return plans of the layouts that fit, the fastest first, each with its largest micro-batch, and those that do not fit.

    A model is spread over as few ranks as can hold it, and over twice as many; more would send more and compute the same. The global
    batch, and everything else that changes what is learned, stays as configured.

    Raises:
        UserError: no layout is accepted for this number of ranks.
    """
    by_size: dict[int, list[RunConfig]] = {}
    for each in accepted_layouts(config, ranks):
        by_size.setdefault(_model_parallel(each), []).append(each)
    if not by_size:
        raise UserError(
            f"No layout of {ranks} ranks fits the model and training.global_batch_size={config.training.global_batch_size}; "
            "choose another number of GPUs."
        )
    plans: list[Plan] = []
    misfits: list[Misfit] = []
    done, total = 0, sum(map(len, by_size.values()))
    sizes_that_fit = 0
    for _, layouts in sorted(by_size.items()):
        if sizes_that_fit == 2:
            break
        before = len(plans)
        for layout in layouts:
            found = largest_micro_batch(layout, ranks, hardware)
            if isinstance(found, Misfit):
                misfits.append(found)
            else:
                plans.append(make_plan(found, ranks, hardware, ranks_per_node))
            done += 1
            progress(done, total)
        sizes_that_fit += len(plans) > before
    progress(total, total)
    return sorted(plans, key=lambda plan: -plan.samples_per_second), misfits


def accepted_layouts(config: RunConfig, ranks: int) -> Iterator[RunConfig]:
    """Yield the configuration in every layout that validation accepts, with micro-batches of one sample."""
    modules = 1 if config.recurrence is None else config.recurrence.num_modules
    for tensor in _powers_of_two(MOST_TENSOR):
        for pipeline in _powers_of_two(MOST_PIPELINE):
            for expert in (size for size in _powers_of_two(modules) if modules % size == 0):
                for recompute in Recompute:
                    parallel = replace(
                        config.parallel,
                        tensor_model_parallel_size=tensor,
                        sequence_parallel=tensor > 1,
                        pipeline_model_parallel_size=pipeline,
                        virtual_pipeline_model_parallel_size=1,
                        expert_model_parallel_size=expert,
                    )
                    training = replace(config.training, micro_batch_size=1, recompute=recompute)
                    layout = replace(config, parallel=parallel, training=training)
                    try:
                        validate(layout, ranks)
                    except UserError:
                        continue
                    yield layout


def largest_micro_batch(layout: RunConfig, ranks: int, hardware: Hardware) -> RunConfig | Misfit:
    """Return the layout with the largest micro-batch, a power of two, that its first stage has room for.

    A moment of a step is a straight line in the number of samples, and the fullest one is the highest of such lines: the line through one
    and two samples is never above it, so what is too much there need not be tried.
    """
    usable = USABLE * hardware.memory
    share = layout.training.global_batch_size // data_parallel_size(layout.parallel, ranks)
    sizes = [size for size in _powers_of_two(MOST_MICRO_BATCH) if share % size == 0]
    peaks = {size: dry_run(_with_micro_batch(layout, size), 0, ranks).peak for size in sizes[:2]}
    each = peaks[2] - peaks[1] if len(peaks) > 1 else 0
    for size in reversed([size for size in sizes if peaks[1] + (size - 1) * each <= usable]):
        sized = _with_micro_batch(layout, size)
        if size in peaks or dry_run(sized, 0, ranks).peak <= usable:
            return sized
    return Misfit(layout, peaks[1])


def _with_micro_batch(layout: RunConfig, size: int) -> RunConfig:
    return replace(layout, training=replace(layout.training, micro_batch_size=size))


def _model_parallel(config: RunConfig) -> int:
    return config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size


def _powers_of_two(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length())]
