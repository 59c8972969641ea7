"""What the nodes of a job have and lack before a run begins on them: ``rmoe diagnose nodes``, which the jobs of ``slurm/`` can start.

Every rank says what its node has; the first one compares. Then all ranks sum a tensor together, and where that is slower than it should
be, the ranks of two nodes at a time do: a node that is slow with each of its two neighbours in a ring is the slow one.
"""

import json
import os
import shutil
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from pydantic import TypeAdapter, with_config

from rmoe_megatron.distributed import launch
from rmoe_megatron.distributed.device import communication_backend, inference_device, synchronize
from rmoe_megatron.errors import RunError, UserError
from rmoe_megatron.files import atomic
from rmoe_megatron.files.untrusted import CLOSED, parse_json

PATIENCE = 120.0  # seconds for all ranks to come, and for a file of one node to be seen by another
SHARED_PATIENCE = 20.0
BYTES = 64 << 20  # of the tensor that is summed
REPEATS = 5
SAME = ("driver", "gpu")  # what all nodes should have alike


@dataclass(frozen=True)
class Limits:
    """What a node must have.

    Attributes:
        gpus: their number.
        bandwidth: GB/s of an all-reduce between nodes, 2 (n - 1) / n times the bytes by the time, as nccl-tests count it; 0 is no limit.
        free: GB of disk, where runs lie and in the folder for temporary files.
        skew: seconds that a clock may differ from the median of all.
    """

    gpus: int
    bandwidth: float
    free: float
    skew: float


@with_config(CLOSED)
class Found(TypedDict):
    """What a rank finds on its node; ``problem`` is empty, or why it cannot go on."""

    node: str
    gpus: int
    gpu: str
    driver: str
    free: float
    free_temporary: float
    problem: str


FOUND = TypeAdapter(Found)


@dataclass
class Report:
    """What was found.

    Attributes:
        lines: to be read by a person, one for each node, and one for all.
        problems: the problems that were found, by the names of the nodes.
    """

    lines: list[str]
    problems: dict[str, list[str]]


def check_nodes(folder: Path, names: list[str], limits: Limits) -> Report | None:
    """Check the nodes of this job; every rank takes part.

    Args:
        folder: on the file system that all nodes share.
        names: the names of the nodes, in the order of their ranks.

    Returns:
        On the first rank what was found, None on the others.

    Raises:
        UserError: the ranks do not divide by the nodes.
        RunError: on other ranks than the first, if one is missing.
    """
    rank, world_size = launch.rank(), launch.world_size()
    if world_size % len(names):
        raise UserError(
            f"{world_size} ranks are not the same number on each of the {len(names)} nodes {', '.join(names)}."
        )
    per_node = world_size // len(names)
    mine = names[rank // per_node]
    problems: dict[str, list[str]] = {name: [] for name in names}
    if world_size == 1:
        found = [_look(mine, folder, limits)]
        _judge(found, limits, problems)
        return Report(_lines(found, [0.0], None), _with_problems(problems))
    address, port = launch.meeting_point()
    holds = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    patience = timedelta(seconds=2 * PATIENCE)  # the first rank waits for all, and the others for it
    store = dist.TCPStore(address, port, is_master=holds, wait_for_workers=False, timeout=patience)
    token = folder / ".node_check"
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write(token, f"{os.getpid()} {time.time_ns()}")
        store.set("token", token.read_text())
    store.set(f"found.{rank}", json.dumps(_look(mine, folder, limits, store.get("token").decode())))
    if rank == 0:
        missing = _wait_for_all(store, world_size)
        for number in missing:
            problems[names[number // per_node]].append(f"rank {number} has not come within {PATIENCE:.0f} s")
        store.set("all", "" if missing else "here")
    if store.get("all") != b"here":
        if rank > 0:
            raise RunError("A rank of this job is missing; the first rank says which.")
        return Report([], _with_problems(problems))
    found = [
        parse_json(store.get(f"found.{number}").decode(), FOUND, f"What rank {number} says")
        for number in range(world_size)
    ]
    if any(each["problem"] for each in found):  # a rank without its GPU cannot sum
        skews, bandwidths = [0.0] * world_size, None
    else:
        skews, bandwidths = _measure(store, rank, world_size, per_node, len(names), limits)
    if rank > 0:
        return None
    _judge(found, limits, problems)
    for number, skew in enumerate(skews):
        if abs(skew) > limits.skew and number % per_node == 0:
            problems[names[number // per_node]].append(
                f"its clock is {abs(skew):.1f} s {'before' if skew > 0 else 'behind'} the others'"
            )
    for number, bandwidth in (bandwidths or {}).items():
        if number >= 0 and bandwidth < limits.bandwidth:
            problems[names[number]].append(
                f"an all-reduce with its neighbours moves {bandwidth:.2f} GB/s, less than {limits.bandwidth:g}"
            )
    token.unlink(missing_ok=True)
    return Report(_lines(found[::per_node], skews[::per_node], bandwidths), _with_problems(problems))


def _look(node: str, folder: Path, limits: Limits, token: str | None = None) -> Found:
    """Return what this rank finds."""
    problem = ""
    try:
        device = inference_device(launch.local_rank())
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
        if device.type == "cuda":
            torch.ones(1, device=device).sum().item()
    except (UserError, RuntimeError) as error:
        gpu, problem = "none", f"its GPU cannot be used ({str(error).splitlines()[0]})"
    if token is not None and not _sees(folder / ".node_check", token):
        problem = problem or f"it does not see the file that the first node has written in {folder}"
    return Found(
        node=node,
        gpus=torch.cuda.device_count(),
        gpu=gpu,
        driver=_driver() if gpu != "none" else "none",
        free=_free(folder),
        free_temporary=_free(Path(tempfile.gettempdir())),
        problem=problem,
    )


def _driver() -> str:
    path = Path("/sys/module/nvidia/version")
    return path.read_text().strip() if path.is_file() else "unknown"


def _free(folder: Path) -> float:
    """Return GB that are free on a folder's disk, 0 if that is not known."""
    try:
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free / 1e9
    except OSError:
        return 0.0


def _sees(path: Path, token: str) -> bool:
    deadline = time.monotonic() + SHARED_PATIENCE
    while time.monotonic() < deadline:
        try:
            if path.read_text() == token:
                return True
        except OSError:
            pass
        time.sleep(0.2)
    return False


def _wait_for_all(store: dist.Store, world_size: int) -> list[int]:
    """Return the ranks that have not said what they find."""
    deadline = time.monotonic() + PATIENCE
    while True:
        missing = [number for number in range(world_size) if not store.check([f"found.{number}"])]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.2)


def _measure(
    store: dist.Store, rank: int, world_size: int, per_node: int, num_nodes: int, limits: Limits
) -> tuple[list[float], dict[int, float]]:
    """Return how many seconds each rank's clock is before the median, and GB/s: of all nodes under -1, of slow ones by number."""
    device = inference_device(launch.local_rank())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        communication_backend(device),
        store=dist.PrefixStore("nodes", store),
        rank=rank,
        world_size=world_size,
    )
    try:
        dist.barrier()
        clocks = [torch.zeros(1, dtype=torch.float64) for _ in range(world_size)]
        dist.all_gather(clocks, torch.tensor([time.time()], dtype=torch.float64))
        median = statistics.median(float(clock) for clock in clocks)
        bandwidths = {-1: _bandwidth(device, None, world_size)}
        if bandwidths[-1] < limits.bandwidth:
            bandwidths |= _of_each_node(device, rank, per_node, num_nodes, bandwidths[-1])
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return [float(clock) - median for clock in clocks], bandwidths


def _of_each_node(
    device: torch.device, rank: int, per_node: int, num_nodes: int, whole: float
) -> dict[int, float]:
    """Return GB/s of every node with the better of its neighbours."""
    best = dict.fromkeys(range(num_nodes), 0.0)
    if num_nodes <= 2:
        return dict.fromkeys(best, whole)
    for first in range(num_nodes):
        pair = (first, (first + 1) % num_nodes)
        ranks = sorted(node * per_node + each for node in pair for each in range(per_node))
        group = dist.new_group(ranks)
        measured = torch.zeros(1, dtype=torch.float64)
        if rank in ranks:
            measured[0] = _bandwidth(device, group, len(ranks))
        dist.all_reduce(measured, op=dist.ReduceOp.MAX)
        for node in pair:
            best[node] = max(best[node], float(measured))
    return best


def _bandwidth(device: torch.device, group: Any, ranks: int) -> float:
    """Return GB/s of an all-reduce as nccl-tests count it; the same on all its ranks."""
    tensor = torch.ones(BYTES // 4, device=device)
    dist.all_reduce(tensor, group=group)  # which connects the ranks
    synchronize(device)
    started = time.perf_counter()
    for _ in range(REPEATS):
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    synchronize(device)
    seconds = torch.tensor([(time.perf_counter() - started) / REPEATS], dtype=torch.float64, device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=group)
    return 2 * (ranks - 1) / ranks * BYTES / float(seconds) / 1e9


def _judge(found: list[Found], limits: Limits, problems: dict[str, list[str]]) -> None:
    """Put down what is wrong with nodes by what their ranks found."""
    usual = {key: Counter(each[key] for each in found).most_common(1)[0][0] for key in SAME}  # type: ignore[literal-required]
    for each in found:
        mine = []
        if each["problem"]:
            mine.append(each["problem"])
        if each["gpus"] != limits.gpus:
            mine.append(f"it has {each['gpus']} GPUs, not {limits.gpus}")
        for key in SAME:
            if each[key] != usual[key] and not each["problem"]:  # type: ignore[literal-required]
                mine.append(f"its {key} is {each[key]}, that of most nodes {usual[key]}")  # type: ignore[literal-required]
        for key, where in (("free", "where runs lie"), ("free_temporary", "for temporary files")):
            if each[key] < limits.free:  # type: ignore[literal-required]
                mine.append(f"{each[key]:.1f} GB of disk are free {where}, less than {limits.free:g}")  # type: ignore[literal-required]
        problems[each["node"]] += [problem for problem in mine if problem not in problems[each["node"]]]


def _with_problems(problems: dict[str, list[str]]) -> dict[str, list[str]]:
    return {name: each for name, each in problems.items() if each}


def _lines(found: list[Found], skews: list[float], bandwidths: dict[int, float] | None) -> list[str]:
    lines = [
        f"{each['node']:<12}  {each['gpus']} GPUs ({each['gpu']}, driver {each['driver']})  clock {skew:+.3f} s  "
        f"free {each['free']:.0f} and {each['free_temporary']:.0f} GB"
        for each, skew in zip(found, skews, strict=True)
    ]
    if bandwidths is not None:
        lines.append(f"an all-reduce of {BYTES >> 20} MiB on all nodes moves {bandwidths[-1]:.2f} GB/s")
    return lines
