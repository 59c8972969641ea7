"""A rank that raises or dies ends the others, which say why; ranks that differ are named."""

import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[2]

# Every rank but the last waits as in a collective that never ends. Only then can it be the watch that ends it.
PROGRAM = """\
import sys, time
from dataclasses import replace
from rmoe_megatron.distributed import rank_watch
from rmoe_megatron.errors import UserError
from rmoe_megatron import versions
from rmoe_megatron.distributed import process_groups as process_groups_code
from rmoe_megatron.distributed.process_groups import process_groups, rank, world_size
from tests.support.configurations import tiny_config

rank_watch.INTERVAL, rank_watch.SILENCE = 0.2, 5.0
what, config = sys.argv[1], tiny_config()
is_last = rank() == world_size() - 1
if what == "other library" and is_last:
    found = versions.versions_of
    process_groups_code.versions_of = lambda *names: found(*names) | {"numpy": "1.0"}
if what == "differ" and is_last:
    config = replace(config, seed=7)
with process_groups(config):
    print("ready", flush=True)
    if is_last and what == "raise":
        raise RuntimeError("broken on purpose")
    if is_last and what == "mistake":
        raise UserError("shard 7 is damaged")
    if what == "suspend":
        time.sleep(12)
    elif what != "end":
        time.sleep(300)
"""
# A rank that is wrong before it meets the others, for which they wait in torch.distributed.
BEFORE_MEETING = """import sys, time
from rmoe_megatron.distributed import rank_watch
from rmoe_megatron.cli.app import _end
from rmoe_megatron.errors import UserError
from rmoe_megatron.distributed.process_groups import process_groups, rank
from tests.support.configurations import tiny_config

rank_watch.INTERVAL = 0.2
try:
    with rank_watch.telling_all_ranks():
        if sys.argv[1] in (str(rank()), "all"):
            raise UserError("the run folder is in use")
        with process_groups(tiny_config()):
            time.sleep(300)
except UserError as error:
    _end(f"error: {error}", 2)
"""
HOLD = """import time, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(300)
"""


def start(what: str, ranks: int = 3) -> tuple[list[subprocess.Popen[str]], dist.TCPStore]:
    """Start the ranks as srun does: no agent looks after them."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return start_at(store.port, what, ranks), store


def start_at(port: int, what: str, ranks: int, program: str = PROGRAM) -> list[subprocess.Popen[str]]:
    shared = {
        **os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", program, what],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Return exit code and standard error of every rank; none may need more than three minutes."""
    deadline = time.monotonic() + 180
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
    wait_until_ready(processes)
    processes[2].send_signal(signal.SIGKILL)
    first, second, _ = finish(processes)
    for code, errors in (first, second):
        assert code == 1
        assert "Rank 2 has not been heard of" in errors


def wait_until_ready(processes: list[subprocess.Popen[str]]) -> None:
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
    except AssertionError:
        finish(processes)
        raise
    time.sleep(1)  # a few heartbeats


def test_a_store_that_is_stopped_ends_all() -> None:
    """The first rank holds the store under srun; stopped, it answers nobody, and its connections stay."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        processes = start_at(int(holder.stdout.readline()), "kill", ranks=2)
        wait_until_ready(processes)
        holder.send_signal(signal.SIGSTOP)
        for code, errors in finish(processes):
            assert code == 1
            assert "The process that holds the job's store has not answered for 5 s" in errors
    finally:
        holder.kill()
        holder.wait()


def test_a_job_that_is_suspended_as_a_whole_goes_on() -> None:
    processes, _store = start("suspend", ranks=2)
    wait_until_ready(processes)
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(8)  # more than what counts as silence
    for process in processes:
        process.send_signal(signal.SIGCONT)
    assert [code for code, _ in finish(processes)] == [0, 0]


@pytest.mark.parametrize("who", ["0", "1"])
def test_a_mistake_before_the_ranks_meet_is_told_to_all(who: str) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = finish(start_at(store.port, who, 2, BEFORE_MEETING))
    assert [code for code, _ in results] == [2, 2]
    said = "".join(errors for _, errors in results)
    assert "Traceback" not in said
    assert said.count("the run folder is in use") == (2 if who == "0" else 1), said


def test_ranks_that_end_well_are_left_alone() -> None:
    processes, _store = start("end")
    assert [code for code, _ in finish(processes)] == [0, 0, 0]


def test_ranks_with_another_configuration_are_named() -> None:
    processes, _store = start("differ")
    for code, errors in finish(processes):
        assert code != 0
        assert "Rank 2 on" in errors
        assert "'seed: 7' instead of 'seed: 0'" in errors


def test_ranks_with_another_version_of_any_library_are_named() -> None:
    processes, _store = start("other library")
    for code, errors in finish(processes):
        assert code != 0
        assert "Rank 2 on" in errors
        assert f"'numpy 1.0' instead of 'numpy {version('numpy')}'" in errors
