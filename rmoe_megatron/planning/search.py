"""Looks for the layout that trains fastest on some accelerators among those that a run would accept and that fit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from rmoe_megatron.config.layout_checks import data_parallel_size
from rmoe_megatron.config.run import ParallelConfig, Recompute, RunConfig
from rmoe_megatron.config.validation import validate
from rmoe_megatron.errors import UserError
from rmoe_megatron.planning.dry_run import dry_run
from rmoe_megatron.planning.hardware import Hardware
from rmoe_megatron.planning.plan import USABLE, Plan, check_known, make_plan, on_gpu, overlaps
from rmoe_megatron.planning.shallow import two_depths
from rmoe_megatron.planning.step_time import stage_time

MOST_TENSOR, MOST_PIPELINE, MOST_MICRO_BATCH = 8, 8, 64
# Samples of a micro-batch that fill a GPU: with as many there is nothing to gain from memory that recomputation frees.
ENOUGH = 8


@dataclass(frozen=True)
class Misfit:
    """A layout that does not fit: its configuration, and the bytes of its first stage with micro-batches of one sample.

    Attributes:
        stays: what stays from step to step is too much by itself, so that recomputation does not help.
    """

    config: RunConfig
    needed: float
    stays: bool = False


@dataclass(frozen=True)
class Estimate:
    """A layout that fits, with its largest micro-batch; of two depths of the first pipeline stage.

    Attributes:
        peak: bytes at the fullest moment of the first stage.
    """

    config: RunConfig
    ranks: int
    peak: float
    samples_per_second: float


def search(
    config: RunConfig,
    ranks: int,
    hardware: Hardware,
    ranks_per_node: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Plan | None, list[Estimate], list[Misfit]]:
    """Return the plan of the fastest layout that fits, estimates of those that fit, the fastest first, and those that do not fit.

    A model is spread over as few ranks as can hold it, and over twice as many; more would send more and compute the same. Recomputation
    is tried where without it fewer than ENOUGH samples fit. Layouts are estimated from runs with fewer blocks; the fastest is then planned
    whole, and the next one if it does not fit. The global batch, and everything else that changes what is learned, stays as configured.

    Raises:
        UserError: no layout is accepted for this number of ranks, or the run has something that a plan does not know.
    """
    check_known(config)
    by_size: dict[int, dict[tuple[int, int, int], list[RunConfig]]] = {}
    accepted = list(accepted_layouts(config, ranks))
    for each in accepted:
        by_size.setdefault(_model_parallel(each), {}).setdefault(_sizes(each.parallel), []).append(each)
    if not by_size:
        raise UserError(
            f"No layout of {ranks} ranks fits the model and training.global_batch_size={config.training.global_batch_size}; "
            "choose another number of GPUs."
        )
    estimates: list[Estimate] = []
    misfits: list[Misfit] = []
    done, sizes_that_fit = 0, 0
    for _, layouts in sorted(by_size.items()):
        if sizes_that_fit == 2:
            break
        before = len(estimates)
        for same_sizes in layouts.values():
            for layout in same_sizes:  # with more and more recomputation
                found = estimate(layout, ranks, hardware, ranks_per_node)
                if isinstance(found, Misfit):
                    misfits.append(found)
                    if found.stays:
                        break
                else:
                    estimates.append(found)
                    if found.config.training.micro_batch_size >= ENOUGH:
                        break
            done += len(same_sizes)
            progress(done, len(accepted))
        sizes_that_fit += len(estimates) > before
    progress(len(accepted), len(accepted))
    estimates.sort(key=lambda each: -each.samples_per_second)
    for fastest in estimates:
        plan = make_plan(fastest.config, ranks, hardware, ranks_per_node)
        if plan.fits:
            return plan, estimates, misfits
    return None, estimates, misfits


def estimate(layout: RunConfig, ranks: int, hardware: Hardware, ranks_per_node: int) -> Estimate | Misfit:
    """Return how fast a layout is with the largest micro-batch, a power of two, that its first stage has room for."""
    usable = USABLE * hardware.memory
    share = layout.training.global_batch_size // data_parallel_size(layout.parallel, ranks)
    sizes = [size for size in _powers_of_two(MOST_MICRO_BATCH) if share % size == 0]
    one = _first_stage(layout, ranks, hardware, ranks_per_node)
    if one.stays > usable:
        return Misfit(layout, one.peak, stays=True)
    # What a sample takes of memory is at most this: some of it does not grow with the micro-batch.
    fitting = [size for size in sizes if one.stays + size * (one.peak - one.stays) <= usable]
    if not fitting:
        return Misfit(layout, one.peak)
    found, size = one, 1
    if fitting[-1] > 1:
        size = fitting[-1]
        found = _first_stage(_with_micro_batch(layout, size), ranks, hardware, ranks_per_node)
        each = (found.peak - one.peak) / (size - 1)
        larger = [other for other in sizes if one.peak + (other - 1) * each <= usable]
        if larger[-1] > size:
            more = _first_stage(_with_micro_batch(layout, larger[-1]), ranks, hardware, ranks_per_node)
            found, size = (more, larger[-1]) if more.peak <= usable else (found, size)
    stages = layout.parallel.pipeline_model_parallel_size
    whole = found.seconds * (1 + (stages - 1) / (share // size))
    rate = layout.training.global_batch_size / whole
    return Estimate(_with_micro_batch(layout, size), ranks, found.peak, rate)


@dataclass(frozen=True)
class _Stage:
    """What the first pipeline stage needs: bytes that stay and bytes at the fullest moment, and seconds of a step without waiting."""

    stays: float
    peak: float
    seconds: float


def _first_stage(config: RunConfig, ranks: int, hardware: Hardware, ranks_per_node: int) -> _Stage:
    """Work out the first stage from two depths, or whole where that spares nothing."""
    config = on_gpu(config)
    depths = two_depths(config)
    reduce, gather = overlaps(config)

    def run(each: RunConfig) -> _Stage:
        usage = dry_run(each, 0, ranks)
        seconds = stage_time(usage, hardware, ranks_per_node, reduce, gather).total
        return _Stage(usage.peak - usage.activations, usage.peak, seconds)

    if depths is None:
        return run(config)
    first, second = run(depths.first), run(depths.second)
    return _Stage(
        depths.whole(first.stays, second.stays),
        depths.whole(first.peak, second.peak),
        depths.whole(first.seconds, second.seconds),
    )


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


def _sizes(parallel: ParallelConfig) -> tuple[int, int, int]:
    return (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.expert_model_parallel_size,
    )


def _model_parallel(config: RunConfig) -> int:
    return config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size


def _powers_of_two(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length())]
