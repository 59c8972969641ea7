"""A plan to read and to look at: a table, and a picture of memory and time."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from rmoe_megatron.config.layout_checks import data_parallel_size
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.planning.plan import MEMORY_KINDS, USABLE, Plan
from rmoe_megatron.planning.search import Misfit

TIME_KINDS = {
    "products": "matrix products",
    "attention": "attention",
    "element_wise": "element-wise",
    "exposed": "messages that nothing hides",
    "bubble": "pipeline's idle time",
}


def describe(plan: Plan, samples: float | None = None, price: float | None = None) -> str:
    """Return a plan as text.

    Args:
        samples: to train on; the cost is of so many.
        price: what one accelerator costs for an hour, in any currency.
    """
    parallel, hardware = plan.config.parallel, plan.hardware
    lines = [
        f"{plan.ranks} x {hardware.name}: tensor {parallel.tensor_model_parallel_size}, pipeline "
        f"{parallel.pipeline_model_parallel_size}, context {parallel.context_parallel_size}, expert "
        f"{parallel.expert_model_parallel_size}, data {data_parallel_size(parallel, plan.ranks)}; micro-batch "
        f"{plan.config.training.micro_batch_size}, {plan.stages[0].micro_batches} of them a step",
        "",
        f"| GB of a rank of stage | {' | '.join(MEMORY_KINDS)} | peak |",
        "|---" * (len(MEMORY_KINDS) + 2) + "|",
    ]
    for number, stage in enumerate(plan.stages):
        cells = " | ".join(f"{getattr(stage, kind) / 1e9:.2f}" for kind in MEMORY_KINDS)
        lines.append(f"| {number} | {cells} | {stage.peak / 1e9:.2f} |")
    usable = USABLE * hardware.memory / 1e9
    verdict = "It fits" if plan.fits else "It does not fit"
    lines += [
        "",
        f"{verdict}: {plan.peak / 1e9:.1f} GB of tensors at the fullest moment, and {usable:.1f} of {hardware.memory / 1e9:.0f} GB can be used.",
        "",
    ]
    for kind, name in TIME_KINDS.items():
        seconds = getattr(plan.seconds, kind)
        lines.append(f"{name:28} {seconds * 1e3:9.1f} ms  {seconds / plan.seconds.total:6.1%}")
    lines.append(
        f"{'a step':28} {plan.seconds.total * 1e3:9.1f} ms  {plan.samples_per_second:.0f} samples/s, {plan.mfu:.1%} MFU "
        f"(an estimate: products at {hardware.product:.0%}, attention at {hardware.attention:.0%} of the data sheet's rate)"
    )
    if samples is not None:
        hours = plan.gpu_hours(samples)
        cost = "" if price is None else f", {hours * price:,.0f} at {price:g} an hour"
        lines.append(f"{samples:g} samples: {hours:,.0f} GPU-hours, {hours / plan.ranks / 24:.1f} days{cost}")
    return "\n".join(lines)


def draw(plan: Plan, path: Path) -> None:
    """Write a picture: memory by kind as a bar for each pipeline stage, and the time of a step as a waterfall."""
    figure, (memory, time) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    names = [f"stage {number}" for number in range(len(plan.stages))]
    bottom = [0.0] * len(names)
    for kind in MEMORY_KINDS:
        heights = [getattr(stage, kind) / 1e9 for stage in plan.stages]
        memory.bar(names, heights, bottom=bottom, label=kind, width=0.6)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    memory.axhline(USABLE * plan.hardware.memory / 1e9, color="black", linestyle="--", label="can be used")
    memory.set(ylabel="GB of a rank", title=f"Memory at the fullest moment ({plan.hardware.name})")
    memory.legend(fontsize=8)
    start = 0.0
    for kind, name in TIME_KINDS.items():
        milliseconds = getattr(plan.seconds, kind) * 1e3
        time.barh(name, milliseconds, left=start, height=0.6)
        time.text(start + milliseconds, name, f" {milliseconds:.0f} ms", va="center", fontsize=8)
        start += milliseconds
    time.invert_yaxis()
    time.margins(x=0.15)
    time.set(
        xlabel="ms of a step (estimated)",
        title=f"{plan.samples_per_second:.0f} samples/s, {plan.mfu:.0%} MFU",
    )
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)


def compare(plans: list[Plan], misfits: list[Misfit]) -> str:
    """Return a table of layouts, the fastest first, and below it why others are not in it."""
    lines = [
        "| tensor | pipeline | expert | data | micro-batch | recompute | GB | samples/s | MFU |",
        "|---" * 9 + "|",
    ]
    for plan in plans:
        lines.append(
            f"| {_layout(plan.config, plan.ranks)} | {plan.peak / 1e9:.1f} | {plan.samples_per_second:.0f} | {plan.mfu:.1%} |"
        )
    for misfit in misfits:
        parallel = misfit.config.parallel
        lines.append(
            f"tensor {parallel.tensor_model_parallel_size}, pipeline {parallel.pipeline_model_parallel_size}, expert "
            f"{parallel.expert_model_parallel_size}, recompute {misfit.config.training.recompute.value} does not fit: micro-batches of "
            f"one sample take {misfit.needed / 1e9:.1f} GB."
        )
    return "\n".join(lines)


def _layout(config: RunConfig, ranks: int) -> str:
    parallel, training = config.parallel, config.training
    return (
        f"{parallel.tensor_model_parallel_size} | {parallel.pipeline_model_parallel_size} | "
        f"{parallel.expert_model_parallel_size} | {data_parallel_size(parallel, ranks)} | {training.micro_batch_size} | "
        f"{training.recompute.value}"
    )
