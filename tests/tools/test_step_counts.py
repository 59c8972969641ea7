"""Counts of a step: another copy in a block is a difference, and so is another message; renewing records it."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import step_counts

from rmoe_megatron.model.block import Block
from rmoe_megatron.planning.dry_run import RankUsage, dry_run
from rmoe_megatron.planning.listening import Collective, Operation
from tests.support.configurations import tiny_config


def test_another_copy_in_a_block_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks: three copies more forward, and nothing of products and messages changes."""
    config = tiny_config(None)
    before = step_counts.counts_of(dry_run(config, 0, 1))
    forward = Block.forward

    def copies_first(block: Block, hidden_states: Any, *arguments: Any, **settings: Any) -> Any:
        return forward(block, hidden_states.clone(), *arguments, **settings)

    monkeypatch.setattr(Block, "forward", copies_first)
    found = list(step_counts.differences(before, step_counts.counts_of(dry_run(config, 0, 1))))
    micro_batches = 2
    assert any(
        line.startswith("forward copy kernels:") and line.endswith(f"(+{3 * micro_batches})")
        for line in found
    )
    assert any(line.startswith("forward bytes:") for line in found)
    assert not any("product" in line or "FLOPs" in line for line in found)


def usage(copies: int, message: int) -> RankUsage:
    return RankUsage(
        0, parameters=1, gradients=2, averages=3, optimizer=4, activations=5, micro_batches=1,
        operations=Counter({Operation("copy", "forward", "float32", 0, 8): copies, Operation("product", "backward", "float32", 6, 12): 2}),
        collectives=Counter({Collective("all-reduce", "update", message, (0, 1)): 3, Collective("all-reduce", "update", 9, (0,)): 1}),
    )  # fmt: skip


def test_counts_are_sums() -> None:
    assert step_counts.counts_of(usage(4, 100)) == {
        "forward": {"copy kernels": 4, "FLOPs": 0, "bytes": 32},
        "backward": {"product kernels": 2, "FLOPs": 12, "bytes": 24},
        "all-reduce": {"messages": 3, "bytes": 300},  # what one rank says to itself is no message
        "memory": {"kept bytes": 10, "activation bytes": 5},
    }


def test_a_difference_fails_until_it_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "counts.json"
    counted: Any = {"shapes": step_counts.counts_of(usage(4, 100))}
    monkeypatch.setattr(step_counts, "count_all", lambda: counted)
    monkeypatch.setattr(sys, "argv", ["step_counts.py", "--renew"])
    step_counts.main(record)
    assert json.loads(record.read_text()) == counted
    monkeypatch.setattr(sys, "argv", ["step_counts.py"])
    capsys.readouterr()
    step_counts.main(record)
    assert capsys.readouterr().out == "Every count is as recorded.\n"
    counted = {"shapes": step_counts.counts_of(usage(5, 104))}
    with pytest.raises(SystemExit):
        step_counts.main(record)
    assert capsys.readouterr().out.splitlines()[:3] == [
        "shapes all-reduce bytes: 300 recorded, 312 counted (+12)",
        "shapes forward bytes: 32 recorded, 40 counted (+8)",
        "shapes forward copy kernels: 4 recorded, 5 counted (+1)",
    ]
