"""A rank that raises or dies ends the others, which say why; ranks that differ are named."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).parents[2]

# Every rank but the last waits as in a collective that never ends. Only then can it be the watch that ends it.
PROGRAM = """\
import sys, time
from dataclasses import replace
from rmoe_megatron import rank_watch
from rmoe_megatron.errors import UserError
from rmoe_megatron.parallel import process_groups, rank, world_size
from tests.support.configurations import tiny_config

rank_watch.INTERVAL, rank_watch.SILENCE = 0.2, 2.0
what, config = sys.argv[1], tiny_config()
is_last = rank() == world_size() - 1
if what == "differ" and is_last:
    config = replace(config, seed=7)
with process_groups(config):
    print("ready", flush=True)
    if is_last and what == "raise":
        raise RuntimeError("broken on purpose")
    if is_last and what == "mistake":
        raise UserError("shard 7 is damaged")
    if what != "end":
        time.sleep(100)
"""


def start(what: str, ranks: int = 3) -> tuple[list[subprocess.Popen[str]], dist.TCPStore]:
    """Start the ranks as srun does: no agent looks after them."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        **os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, what],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    return processes, store


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Return exit code and standard error of every rank; none may need more than 60 seconds."""
    deadline = time.monotonic() + 60
    try:
        results = []
        for process in processes:
            _, errors = process.communicate(timeout=deadline - time.monotonic())
            results.append((process.returncode, errors))
        return results
    finally:
        for process in processes:
            process.kill()


def test_a_rank_that_raises_ends_all_with_its_traceback_in_every_log() -> None:
    processes, _store = start("raise")
    for code, errors in finish(processes):
        assert code == 1
        assert 'RuntimeError("broken on purpose")' in errors or "RuntimeError: broken on purpose" in errors


def test_a_mistake_found_by_one_rank_is_told_by_all() -> None:
    processes, _store = start("mistake")
    first, second, _ = finish(processes)
    for code, errors in (first, second):
        assert code == 2
        assert "Rank 2" in errors
        assert "shard 7 is damaged" in errors
        assert "Traceback" not in errors


def test_a_killed_rank_ends_all() -> None:
    processes, _store = start("kill")
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
    except AssertionError:
        finish(processes)
        raise
    time.sleep(1)  # a few heartbeats
    processes[2].send_signal(signal.SIGKILL)
    first, second, _ = finish(processes)
    for code, errors in (first, second):
        assert code == 1
        assert "Rank 2 has not been heard of" in errors


def test_ranks_that_end_well_are_left_alone() -> None:
    processes, _store = start("end")
    assert [code for code, _ in finish(processes)] == [0, 0, 0]


def test_ranks_with_another_configuration_are_named() -> None:
    processes, _store = start("differ")
    for code, errors in finish(processes):
        assert code != 0
        assert "Rank 2 on" in errors
        assert "'seed: 7' instead of 'seed: 0'" in errors
