"""How long a step takes by the roofline: every operation is bound by arithmetic or by memory, every message by its link."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields

from rmoe_megatron.planning.dry_run import RankUsage
from rmoe_megatron.planning.hardware import Hardware
from rmoe_megatron.planning.listening import Collective, Operation

# Share of a pass behind which messages of data parallelism can hide when they overlap it: the last bucket has nothing to hide behind.
HIDES = 0.9


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what takes them; ``exposed`` are messages that nothing hides, ``bubble`` the pipeline's idle time."""

    products: float = 0.0
    attention: float = 0.0
    element_wise: float = 0.0
    exposed: float = 0.0
    bubble: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(getattr(self, field.name) for field in fields(self))


def operation_seconds(operation: Operation, hardware: Hardware) -> float:
    """Return the time of one operation: the longest of its arithmetic, its traffic with memory, and that of the smallest kernel."""
    return max(arithmetic_seconds(operation, hardware), traffic_seconds(operation, hardware), hardware.kernel)


def arithmetic_seconds(operation: Operation, hardware: Hardware) -> float:
    """Return the time of an operation's arithmetic alone."""
    rate = hardware.fp32_flops if operation.dtype == "float32" else hardware.bf16_flops
    share = hardware.attention if operation.kind == "attention" else hardware.product
    return operation.flops / (rate * share)


def traffic_seconds(operation: Operation, hardware: Hardware) -> float:
    """Return the time of an operation's traffic with memory alone."""
    return operation.bytes / (hardware.bandwidth * hardware.element_wise)


def message_seconds(message: Collective, hardware: Hardware, ranks_per_node: int) -> float:
    """Return the time of one message by rings: every byte passes every link but one, in an all-reduce twice.

    Args:
        ranks_per_node: ranks are numbered node by node.
    """
    ranks = len(message.ranks)
    if ranks < 2:
        return 0.0
    nodes = {rank // ranks_per_node for rank in message.ranks}
    rate = (hardware.link if len(nodes) == 1 else hardware.network) * hardware.message
    passes = {"all-reduce": 2 * (ranks - 1) / ranks, "broadcast": 1.0, "send": 1.0, "receive": 0.0}
    return hardware.latency + message.bytes * passes.get(message.kind, (ranks - 1) / ranks) / rate


def hides_behind(message: Collective, overlaps_reduce: bool, overlaps_gather: bool) -> str | None:
    """Return the pass behind which a message can hide, None if it is waited for.

    Args:
        overlaps_reduce: gradients are reduced while the backward pass goes on.
        overlaps_gather: parameters are gathered while passes go on.
    """
    if not message.is_data_parallel:
        return None
    if message.kind in ("reduce-scatter", "all-reduce"):
        return "backward" if overlaps_reduce else None
    if message.kind == "all-gather" and overlaps_gather:
        # ZeRO's third stage gathers parameters for the backward pass too.
        return "backward" if message.phase == "backward" else "forward"
    return None


def stage_time(
    usage: RankUsage, hardware: Hardware, ranks_per_node: int, overlaps_reduce: bool, overlaps_gather: bool
) -> StepTime:
    """Return the time of a step of one pipeline stage, without waiting for the others.

    Args:
        overlaps_reduce: gradients are reduced while the backward pass goes on.
        overlaps_gather: updated parameters are gathered while the next forward pass goes on.
    """
    kinds: Counter[str] = Counter()
    passes: Counter[str] = Counter()
    for operation, count in usage.operations.items():
        seconds = count * operation_seconds(operation, hardware)
        kinds[operation.kind] += seconds  # type: ignore[assignment]
        passes[operation.phase] += seconds  # type: ignore[assignment]
    exposed, hidden = 0.0, Counter[str]()
    for message, count in usage.collectives.items():
        seconds = count * message_seconds(message, hardware, ranks_per_node)
        behind = hides_behind(message, overlaps_reduce, overlaps_gather)
        if behind is None:
            exposed += seconds
        else:
            hidden[behind] += seconds  # type: ignore[assignment]
    exposed += sum(max(0.0, seconds - HIDES * passes[phase]) for phase, seconds in hidden.items())
    return StepTime(
        products=kinds["product"],
        attention=kinds["attention"],
        element_wise=kinds["element-wise"] + kinds["copy"],
        exposed=exposed,
    )


def pipeline_time(stages: Iterable[StepTime], micro_batches: int, chunks: int = 1) -> StepTime:
    """Return the time of a step of all stages: that of the slowest one, and what it waits for the first and the last micro-batch.

    Args:
        stages: the time of each by itself.
        micro_batches: how many micro-batches a step has.
        chunks: how many chunks of the model every stage has, with the interleaved schedule.
    """
    all_stages = list(stages)
    slowest = max(all_stages, key=lambda stage: stage.total)
    bubble = slowest.total * (len(all_stages) - 1) / (micro_batches * chunks)
    return StepTime(slowest.products, slowest.attention, slowest.element_wise, slowest.exposed, bubble)
