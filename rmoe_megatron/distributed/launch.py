"""Which process of a job this is, where the job's processes meet, and what SLURM says of the job.

A job is started by torchrun, by SLURM's ``srun`` with a task for every rank, or as one process. torchrun's variables
(RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT) can also be set by hand. Where both torchrun's and
srun's are there they must say the same, or torchrun must have been started once in every task: otherwise a job would be
several runs in one folder.
"""

import os
import re

from rmoe_megatron.errors import UserError

MAX_RANKS = 1 << 20
MAX_JOB_ID = (1 << 32) - 1  # the upper bits are the cluster's number where clusters are federated
# SLURM numbers the steps of srun from 0. From this number on are steps of other kinds, which have no tasks that could be ranks:
# the batch script, the shell of an salloc, what SLURM starts for its own use.
FIRST_OTHER_STEP = 0xFFFFFFF0
# Below the ports that systems hand out by themselves; one job in this many shares its port with another.
FIRST_PORT, NUM_PORTS = 10_000, 20_000


def world_size() -> int:
    """Return the number of ranks.

    Raises:
        UserError: WORLD_SIZE is no such number, the variables that say where the ranks meet are missing, or torchrun and
            SLURM disagree.
    """
    tasks = _tasks()
    if tasks > 1 and os.environ.get("GROUP_WORLD_SIZE"):
        _check_agents(tasks)
        tasks = 1
    size = _number("WORLD_SIZE", least=1, most=MAX_RANKS, slurm=tasks if tasks > 1 else None, default=1)
    if size > 1 and tasks == 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise UserError(
                    f"WORLD_SIZE is {size} but {name} is not set; start several ranks with torchrun or srun, or unset "
                    "WORLD_SIZE."
                )
        _port()
    return size


def rank() -> int:
    """Return this process's number among all.

    Raises:
        UserError: RANK is no number below WORLD_SIZE, or not SLURM_PROCID.
    """
    return _number("RANK", least=0, most=world_size() - 1, slurm=_of_step("SLURM_PROCID"), default=0)


def local_rank() -> int:
    """Return this process's number among those of its host, which picks its GPU.

    Raises:
        UserError: LOCAL_RANK is no number below WORLD_SIZE, or not SLURM_LOCALID.
    """
    return _number("LOCAL_RANK", least=0, most=world_size() - 1, slurm=_of_step("SLURM_LOCALID"), default=0)


def require_one_rank(command: str) -> None:
    """Check that a command whose work is not shared was started once: several ranks would write the same files.

    Args:
        command: as it is typed, for the message.

    Raises:
        UserError: the job has several ranks.
    """
    if world_size() > 1:
        raise UserError(
            f"`{command}` does its work in one process, but this job has {world_size()} ranks; start it without torchrun, and in "
            "a SLURM job with srun --ntasks=1."
        )


def ranks_on_host() -> int:
    """Return the number of ranks of this host, 1 where neither torchrun nor SLURM says it.

    Raises:
        UserError: LOCAL_WORLD_SIZE is no such number, or not that of SLURM.
    """
    node, tasks = _of_step("SLURM_NODEID"), None
    if node is not None:
        per_node = tasks_per_node(os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
        tasks = per_node[node] if node < len(per_node) else None
    return _number("LOCAL_WORLD_SIZE", least=1, most=world_size(), slurm=tasks, default=1)


def rendezvous_url() -> str:
    """Return where the ranks of a job with several meet, for ``torch.distributed.rendezvous``.

    With srun it is the first node of the step and a port that follows from the job's and the step's number, so that
    all tasks know it; MASTER_ADDR and MASTER_PORT take precedence.

    Raises:
        UserError: MASTER_PORT is no port.
    """
    if not _is_step():
        return "env://"  # torchrun's agent may hold the store already, which this knows
    address, port = meeting_point()
    address = f"[{address}]" if ":" in address else address
    return f"tcp://{address}:{port}?rank={rank()}&world_size={world_size()}"


def meeting_point() -> tuple[str, int]:
    """Return the address and the port at which the ranks of a job with several meet; see :func:`rendezvous_url`."""
    address = os.environ.get("MASTER_ADDR") or first_host(os.environ.get("SLURM_STEP_NODELIST", ""))
    return address, _port()


def is_main_process() -> bool:
    """Whether this process prints what concerns the whole job; also where the variables are wrong."""
    number = os.environ.get("RANK", "").strip() or str(_of_step("SLURM_PROCID") or 0)
    return number == "0" or not number.isdigit()


def end_of_job() -> float | None:
    """Return when SLURM ends this job, in seconds since 1970, None if it doesn't or doesn't say so.

    Raises:
        UserError: SLURM_JOB_END_TIME is no number.
    """
    return float(_number("SLURM_JOB_END_TIME", least=0, most=10**11, default=0)) or None


def restart_count() -> int:
    """Return how often SLURM has started this job again."""
    return _number("SLURM_RESTART_COUNT", least=0, most=10**6, default=0)


def job_id() -> str | None:
    """Return the number of this SLURM job, None outside of one."""
    return os.environ.get("SLURM_JOB_ID") or None


def first_host(nodes: str) -> str:
    """Return the first host of a SLURM node list: ``gpu[07-09,12],cpu1`` begins with ``gpu07``.

    Raises:
        UserError: the list is empty or not of that form.
    """
    first = re.match(r"(?:[^,\[\]]|\[\d+(?:[-,]\d+)*\])+(?=,|$)", nodes)
    if first is None:
        raise UserError(
            f"SLURM_STEP_NODELIST is {nodes[:80]!r}, which names no host; set MASTER_ADDR to that of rank 0."
        )
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first.group())


def tasks_per_node(counts: str) -> list[int]:
    """Return the tasks of every node of a step: ``4(x2),3`` is 4, 4, 3."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(tasks) for tasks, nodes in found for _ in range(int(nodes or 1))]


def _tasks() -> int:
    """Return the number of tasks of the srun step that this process is of, 1 outside of one.

    A batch script and the shell of an salloc have SLURM's other variables too and are no tasks.
    """
    if _step() is None:
        return 1
    return _number("SLURM_STEP_NUM_TASKS", least=1, most=MAX_RANKS, default=1)


def _step() -> int | None:
    """Return the number of the srun step that this process is of, None outside of one."""
    text = os.environ.get("SLURM_STEP_ID", "").strip()
    if not (text.isascii() and text.isdigit()):
        return None
    number = _number("SLURM_STEP_ID", least=0, most=0xFFFFFFFF, default=0)
    return number if number < FIRST_OTHER_STEP else None


def _is_step() -> bool:
    """Whether srun made the ranks; a step of one task says nothing about them, nor does one that starts torchrun."""
    return _tasks() > 1 and not os.environ.get("GROUP_WORLD_SIZE")


def _of_step(name: str) -> int | None:
    return _number(name, least=0, most=_tasks() - 1, default=0) if _is_step() else None


def _check_agents(tasks: int) -> None:
    agents = _number("GROUP_WORLD_SIZE", least=1, most=MAX_RANKS, default=1)
    if agents != tasks:
        raise UserError(
            f"srun started {tasks} tasks, each of which started torchrun, but torchrun joined {agents} of them to a job; "
            "start torchrun once a node (srun --ntasks-per-node=1, torchrun --nnodes), or rmoe without torchrun."
        )


def _port() -> int:
    job = _number("SLURM_JOB_ID", least=0, most=MAX_JOB_ID, default=0)
    default = FIRST_PORT + (job * 101 + (_step() or 0)) % NUM_PORTS
    return _number("MASTER_PORT", least=1, most=65535, default=default)


def _number(name: str, least: int, most: int, default: int, slurm: int | None = None) -> int:
    """Return a variable's number; ``slurm`` is what SLURM says of the same, if it does."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default if slurm is None else slurm
    if not (text.isascii() and text.isdigit() and len(text) < 12 and least <= int(text) <= most):
        raise UserError(
            f"The environment variable {name} is {text[:40]!r}, not a number from {least} to {most}; start the job with "
            "torchrun or srun, or unset it."
        )
    if slurm is not None and int(text) != slurm:
        raise UserError(
            f"The environment variable {name} is {text}, but SLURM says {slurm} for this task; leave it to srun and "
            "unset it, or start torchrun once a node."
        )
    return int(text)
