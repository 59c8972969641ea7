"""The table of plans: its figures of a plan that is worked out by hand, and that the ledger holds the rows that the tool makes."""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import ledger
import plan_table

from rmoe_megatron.planning.dry_run import RankUsage
from rmoe_megatron.planning.hardware import HARDWARE
from rmoe_megatron.planning.plan import Plan
from rmoe_megatron.planning.step_time import StepTime
from tests.support.configurations import tiny_config
from tests.support.ranks import layout


def stage(activations: float) -> RankUsage:
    return RankUsage(
        0, parameters=4 * 10**9, gradients=8 * 10**9, averages=2 * 10**9, optimizer=6 * 10**9, activations=round(activations * 1e9),
        operations=Counter(), collectives=Counter(), micro_batches=2,
    )  # fmt: skip


def test_figures_are_those_of_the_fullest_stage() -> None:
    """Two stages of 20 GB with 10 and 54 on top; 600 steps of half a second are five minutes."""
    config = tiny_config(None, parallel=layout(pp=2), training=replace(tiny_config().training, steps=600))
    plan = Plan(config, HARDWARE["h100"], 4, [stage(10), stage(54)], StepTime(products=0.5))
    figures = plan_table.figures_of(plan, "a model")
    assert figures | {"model": "a model"} == figures
    assert (figures["gpus"], figures["layout"]) == ("4 x H100 80 GB", "data 2, pipeline 2")
    assert (figures["peak"], figures["activations"], figures["fits"]) == (74, 54, "does not fit")
    assert (figures["seconds"], figures["minutes"]) == (0.5, 5)
    assert figures["usable"] == pytest.approx(73.6)


def test_the_ledger_has_the_rows_and_their_commands() -> None:
    commands = {f"calculated/plan-{row.name}": row.command for row in plan_table.ROWS}
    recorded = {
        name: record["command"]
        for name, record in ledger.load().items()
        if name.startswith("calculated/plan-")
    }
    assert recorded == commands
