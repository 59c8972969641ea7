"""The roofline, the rings and the pipeline's idle time, each by hand."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from rmoe_megatron.errors import UserError
from rmoe_megatron.planning.dry_run import RankUsage
from rmoe_megatron.planning.hardware import Hardware, find_hardware
from rmoe_megatron.planning.listening import Collective, Operation
from rmoe_megatron.planning.step_time import (
    StepTime,
    message_seconds,
    operation_seconds,
    pipeline_time,
    stage_time,
)

# 100 TFLOP/s and 1 TB/s of which half is reached, 100 GB/s to neighbours and 10 GB/s to other nodes, all of which is.
ROUND = Hardware(
    "round", memory=1e9, bf16_flops=1e14, fp32_flops=1e13, bandwidth=1e12, link=1e11, network=1e10, product=0.5, attention=0.25,
    element_wise=0.5, message=1.0, latency=0.0, kernel=1e-9,
)  # fmt: skip


@pytest.mark.parametrize(
    ("operation", "seconds"),
    [
        (
            Operation("product", "forward", "bfloat16", flops=10**14, bytes=10**9),
            2.0,
        ),  # arithmetic; traffic takes 2 ms
        (Operation("product", "forward", "float32", flops=10**13, bytes=0), 2.0),
        (Operation("attention", "forward", "bfloat16", flops=10**14, bytes=0), 4.0),
        (Operation("product", "forward", "bfloat16", flops=10**9, bytes=10**12), 2.0),  # traffic
        (Operation("element-wise", "forward", "bfloat16", flops=0, bytes=10**12), 2.0),
        (Operation("element-wise", "forward", "bfloat16", flops=0, bytes=4), 1e-9),  # the smallest kernel
    ],
)
def test_an_operation_is_bound_by_arithmetic_or_by_memory(operation: Operation, seconds: float) -> None:
    assert operation_seconds(operation, ROUND) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("kind", "ranks", "seconds"),
    [
        ("all-gather", (0, 1, 2, 3), 0.75),  # three quarters of 100 GB pass each link at 100 GB/s
        ("reduce-scatter", (0, 1, 2, 3), 0.75),
        ("all-to-all", (0, 1, 2, 3), 0.75),
        ("all-reduce", (0, 1, 2, 3), 1.5),
        ("all-reduce", (0, 8), 10.0),  # another node: the whole of it at 10 GB/s
        ("send", (3, 4), 1.0),
        ("receive", (3, 4), 0.0),  # who sends has counted it
        ("all-reduce", (5,), 0.0),
    ],
)
def test_a_message_passes_rings(kind: str, ranks: tuple[int, ...], seconds: float) -> None:
    message = Collective(kind, "forward", 10**11, ranks)
    assert message_seconds(message, ROUND, ranks_per_node=8) == pytest.approx(seconds)


def test_messages_of_data_parallelism_hide_behind_a_pass() -> None:
    """The backward pass takes 2 s, of which 0.9 hide messages: of 3 s that the gradients take, 1.2 s remain."""
    usage = RankUsage(
        rank=0, parameters=0, gradients=0, averages=0, optimizer=0, activations=0, micro_batches=1,
        operations=Counter({Operation("product", "backward", "bfloat16", 10**14, 0): 1}),
        collectives=Counter(
            {
                Collective("reduce-scatter", "backward", 2 * 10**11, (0, 1), is_data_parallel=True): 3,
                Collective("all-reduce", "forward", 10**11, (0, 1)): 1,
            }
        ),
    )  # fmt: skip
    apart = stage_time(usage, ROUND, 8, overlaps_reduce=False, overlaps_gather=False)
    assert apart == StepTime(products=2.0, exposed=pytest.approx(4.0))
    overlapped = stage_time(usage, ROUND, 8, overlaps_reduce=True, overlaps_gather=True)
    assert overlapped.exposed == pytest.approx(1.0 + 3.0 - 1.8)


def test_a_pipeline_waits_for_the_first_and_the_last_micro_batch() -> None:
    """Four stages and eight micro-batches: the slowest stage takes 8 s, and three times a micro-batch's second on top."""
    stages = [StepTime(products=6.0), StepTime(products=7.0, exposed=1.0), StepTime(products=5.0), StepTime()]
    assert pipeline_time(stages, micro_batches=8).bubble == pytest.approx(3.0)
    assert pipeline_time(stages, micro_batches=8).total == pytest.approx(11.0)
    assert pipeline_time(stages, micro_batches=8, chunks=3).bubble == pytest.approx(1.0)
    assert pipeline_time(stages[:1], micro_batches=8).bubble == 0


def test_figures_of_a_file_take_the_place_of_the_table(tmp_path: Path) -> None:
    measured = tmp_path / "ours.json"
    measured.write_text('{"network": 2.5e10, "product": 0.5}')
    assert find_hardware("H100", measured) == replace(find_hardware("h100"), network=2.5e10, product=0.5)
    measured.write_text('{"network": 0}')
    with pytest.raises(UserError, match="network is 0"):
        find_hardware("h100", measured)
    with pytest.raises(UserError, match="--gpu v100 is not known; choose a100, h100"):
        find_hardware("v100")
