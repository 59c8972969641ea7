"""A plan to read and to look at: a table, and a picture of memory and time."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from rmoe_megatron.config.layout_checks import data_parallel_size
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.planning.costs import Storage
from rmoe_megatron.planning.listening import BLOCK, Place
from rmoe_megatron.planning.plan import MEMORY_KINDS, USABLE, Plan, overlaps
from rmoe_megatron.planning.search import Estimate, Misfit
from rmoe_megatron.planning.step_time import hides_behind, message_seconds

TIME_KINDS = {
    "products": "matrix products",
    "attention": "attention",
    "element_wise": "element-wise",
    "exposed": "messages that nothing hides",
    "bubble": "pipeline's idle time",
}


def describe(plan: Plan, storage: Storage, samples: float | None = None, price: float | None = None) -> str:
    """Return a plan as text.

    Args:
        storage: what the run reads and writes.
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
    lines += [*_fullest_moment(plan), ""]
    for kind, name in TIME_KINDS.items():
        seconds = getattr(plan.seconds, kind)
        lines.append(f"{name:28} {seconds * 1e3:9.1f} ms  {seconds / plan.seconds.total:6.1%}")
    lines.append(
        f"{'a step':28} {plan.seconds.total * 1e3:9.1f} ms  {plan.samples_per_second:.0f} samples/s, {plan.mfu:.1%} MFU "
        f"(an estimate: products at {hardware.product:.0%}, attention at {hardware.attention:.0%} of the data sheet's rate)"
    )
    lines += ["", *_messages(plan), "", *_storage(plan, storage)]
    if samples is not None:
        hours = plan.gpu_hours(samples)
        cost = "" if price is None else f", {hours * price:,.0f} at {price:g} an hour"
        lines.append(f"{samples:g} samples: {hours:,.0f} GPU-hours, {hours / plan.ranks / 24:.1f} days{cost}")
    return "\n".join(lines)


def _messages(plan: Plan) -> list[str]:
    """Return what the first stage sends in a step, by what it is and between how many ranks."""
    overlapped = overlaps(plan.config)
    rows: dict[tuple[int, bool, str, str], tuple[int, float, float]] = {}
    for message, count in plan.stages[0].collectives.items():
        if len(message.ranks) > 1:
            nodes = {rank // plan.ranks_per_node for rank in message.ranks}
            behind = hides_behind(message, *overlapped) or "nothing"
            key = len(message.ranks), len(nodes) > 1, message.kind, behind
            number, size, seconds = rows.get(key, (0, 0.0, 0.0))
            each = message_seconds(message, plan.hardware, plan.ranks_per_node)
            rows[key] = number + count, size + count * message.bytes, seconds + count * each
    if not rows:
        return ["It sends nothing."]
    lines = [
        "| messages of stage 0 | ranks | way | number | GB | ms | hide behind |",
        "|---" * 7 + "|",
    ]
    for (ranks, leaves, kind, behind), (number, size, seconds) in sorted(rows.items()):
        way = "between nodes" if leaves else "in a node"
        lines.append(
            f"| {kind} | {ranks} | {way} | {number} | {size / 1e9:.3f} | {seconds * 1e3:.1f} | {behind} |"
        )
    return lines


def _storage(plan: Plan, storage: Storage) -> list[str]:
    """Return what is read and written, and how long a run waits for it."""
    lines = []
    if storage.sample is not None:
        rate = storage.sample * plan.samples_per_second
        lines.append(
            f"Data: {rate / 1e6:,.1f} MB/s of latents and embeddings, {storage.sample / 1e3:,.1f} kB a sample."
        )
    lines.append(
        f"Checkpoint: {storage.checkpoint / 1e9:.1f} GB, {storage.checkpoint / plan.hardware.storage:.1f} s at an assumed "
        f"{plan.hardware.storage / 1e9:g} GB/s; one every {plan.config.checkpoint.every} steps takes "
        f"{plan.checkpoint_share(storage.checkpoint):.2%} of the time."
    )
    return lines


def _fullest_moment(plan: Plan) -> list[str]:
    """Return what is alive on top of what stays at the fullest moment of the fullest stage, by who made it; blocks in a row together."""
    number, stage = max(enumerate(plan.stages), key=lambda each: each[1].peak)
    lines = [f"Activations at the fullest moment of stage {number}, by where they were made:"]
    for phase in sorted({place.phase for place in stage.at_peak}, reverse=True):  # update, forward, backward
        blocks = sorted(
            (int(place.part.removeprefix(BLOCK)), size)
            for place, size in stage.at_peak.items()
            if place.phase == phase and place.part.startswith(BLOCK)
        )
        if blocks:
            sizes = [size for _, size in blocks]
            lines.append(
                f"  {phase or 'before':9} {len(blocks)} blocks ({blocks[0][0]} to {blocks[-1][0]}): {sum(sizes) / 1e9:.2f} GB, "
                f"{min(sizes) / 1e9:.3f} to {max(sizes) / 1e9:.3f} each"
            )
        outside = sum(
            size
            for place, size in stage.at_peak.items()
            if place.phase == phase and not place.part.startswith(BLOCK)
        )
        if outside:
            lines.append(f"  {phase or 'before':9} outside of the blocks: {outside / 1e9:.2f} GB")
    return lines


def draw(plan: Plan, path: Path) -> None:
    """Write a picture: memory by kind as a bar for each pipeline stage, activations by block, and the time of a step as a waterfall."""
    figure, (memory, blocks, time) = pyplot.subplots(1, 3, figsize=(18, 4.5), layout="constrained")
    names = [f"stage {number}" for number in range(len(plan.stages))]
    bottom = [0.0] * len(names)
    for kind in MEMORY_KINDS:
        heights = [getattr(stage, kind) / 1e9 for stage in plan.stages]
        memory.bar(names, heights, bottom=bottom, label=kind, width=0.6)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    memory.axhline(USABLE * plan.hardware.memory / 1e9, color="black", linestyle="--", label="can be used")
    memory.set(ylabel="GB of a rank", title=f"Memory at the fullest moment ({plan.hardware.name})")
    memory.legend(fontsize=8)
    _draw_fullest_moment(plan, blocks)
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


def _draw_fullest_moment(plan: Plan, axes: Any) -> None:
    """Draw the activations of the fullest stage at its fullest moment, a bar for each block, by the pass that made them."""
    stage = max(plan.stages, key=lambda each: each.peak)
    parts = sorted(
        {place.part for place in stage.at_peak},
        key=lambda part: int(part.removeprefix(BLOCK)) if part.startswith(BLOCK) else -1,
    )
    bottom = [0.0] * len(parts)
    names = [part.removeprefix(BLOCK) if part.startswith(BLOCK) else "rest" for part in parts]
    for phase in ("forward", "backward", "update"):
        heights = [stage.at_peak[Place(part, phase)] / 1e9 for part in parts]
        axes.bar(names, heights, bottom=bottom, label=phase)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.tick_params(axis="x", labelsize=7)
    axes.set(xlabel="block", ylabel="GB", title="Activations at the fullest moment, by block and pass")
    axes.legend(fontsize=8)


def compare(estimates: list[Estimate], misfits: list[Misfit]) -> str:
    """Return a table of layouts, the fastest first, and below it why others are not in it."""
    lines = [
        "Estimated from fewer blocks; the GB are of the first pipeline stage:",
        "",
        "| tensor | pipeline | expert | data | micro-batch | recompute | GB | samples/s |",
        "|---" * 8 + "|",
    ]
    for each in estimates:
        lines.append(
            f"| {_layout(each.config, each.ranks)} | {each.peak / 1e9:.1f} | {each.samples_per_second:.0f} |"
        )
    lines.append("")
    for misfit in misfits:
        parallel = misfit.config.parallel
        lines.append(
            f"tensor {parallel.tensor_model_parallel_size}, pipeline {parallel.pipeline_model_parallel_size}, expert "
            f"{parallel.expert_model_parallel_size}, recompute {'or not' if misfit.stays else misfit.config.training.recompute.value}, "
            f"does not fit: micro-batches of one sample take {misfit.needed / 1e9:.1f} GB."
        )
    return "\n".join(lines)


def _layout(config: RunConfig, ranks: int) -> str:
    parallel, training = config.parallel, config.training
    return (
        f"{parallel.tensor_model_parallel_size} | {parallel.pipeline_model_parallel_size} | "
        f"{parallel.expert_model_parallel_size} | {data_parallel_size(parallel, ranks)} | {training.micro_batch_size} | "
        f"{training.recompute.value}"
    )
