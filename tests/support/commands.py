"""Processes of ``rmoe`` for tests, with a time-out.

They are forked from multiprocessing's fork server, which has imported everything and run nothing: a new interpreter takes as long
to import PyTorch and Megatron-Core as most tests take to run. What a test wants to know of a process (its command line, its
environment, what importing prints) only a fresh one shows.
"""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context, set_start_method
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import psutil
from torch import multiprocessing
from torch.distributed import TCPStore

PRELOADED = [
    "rmoe_megatron.cli", "rmoe_megatron.training.run", "rmoe_megatron.conversion.importing", "rmoe_megatron.conversion.export",
    "rmoe_megatron.inference.sampling", "rmoe_megatron.precompute.job", "rmoe_megatron.training.preflight",
    "rmoe_megatron.evaluation.geneval.evaluate", "rmoe_megatron.evaluation.geneval2.evaluate", "rmoe_megatron.evaluation.dpg.evaluate",
    "rmoe_megatron.evaluation.corebench.evaluate", "rmoe_megatron.evaluation.imagenet.evaluate",
    "rmoe_megatron.evaluation.preference.evaluate",
]  # fmt: skip
# Of every fork server of this process, here and in tests/support/ranks.py.
multiprocessing.set_forkserver_preload(PRELOADED)

_CONTEXT = get_context("forkserver")
_LAUNCHED = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_USE_AGENT_STORE",
)


class Command:
    """A running command: what tests use of ``subprocess.Popen``; its output goes to files."""

    def __init__(self, arguments: list[str], ranks: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.errors = Path(self._folder.name) / "stderr"
        self.errors.touch()
        here, there = _CONTEXT.Pipe()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._process = _CONTEXT.Process(
            target=_run, args=(arguments, ranks, environment, Path.cwd(), self.errors, there)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        there.close()
        assert here.poll(60), "the fork server does not answer"
        here.recv()  # it leads a process group now

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        """kill -9 the process alone."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("rmoe", timeout or 0)
        return self._process.exitcode


def start(arguments: list[str], ranks: int = 1) -> Command:
    """Start ``rmoe`` with ``arguments`` in a process group of its own; several ranks with the variables that torchrun sets."""
    return Command(arguments, ranks)


def start_fresh(arguments: list[str], ranks: int = 1) -> subprocess.Popen[str]:
    """Start ``rmoe`` in a new interpreter and a process group of its own, under torchrun for several ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*launcher, "-m", "rmoe_megatron", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: Command | subprocess.Popen[str], timeout: float = 240) -> tuple[int, str]:
    """Wait for a process; returns exit code and standard error. A time-out kills the whole group."""
    try:
        if isinstance(process, Command):
            return process.wait(timeout), process.errors.read_text()
        _, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    return process.returncode, errors


def kill(process: Command | subprocess.Popen[str]) -> None:
    """kill -9 the process and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def session_processes(session: int) -> list[str]:
    """Return the command lines of the processes that still run in a session."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {' '.join(process.cmdline())}")
    return found


def rmoe(*arguments: str, ranks: int = 1) -> tuple[int, str]:
    """Run ``rmoe`` to its end; returns exit code and standard error."""
    return finish(start(list(arguments), ranks))


def _run(
    arguments: list[str],
    ranks: int,
    environment: dict[str, str],
    folder: Path,
    errors: Path,
    ready: Connection,
) -> None:
    set_start_method("fork", force=True)  # a new interpreter's
    signal.signal(signal.SIGINT, signal.default_int_handler)  # likewise; tests in the background ignore it
    os.setsid()
    ready.send(None)
    ready.close()
    become(arguments, ranks, environment, folder, errors)


def become(
    arguments: list[str], ranks: int, environment: dict[str, str], folder: Path, errors: Path
) -> NoReturn:
    """Be ``rmoe`` with ``arguments`` in ``folder`` from now on, or the parent of its ranks; standard error goes to a file."""
    sink = os.open(errors, os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    os.dup2(sink, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["rmoe", *arguments]
    gc.freeze()  # what was imported stays: checkpoints collect garbage several times, half a second each with it
    if ranks == 1:
        _main()
    children, readers, writers = {}, *zip(*(os.pipe() for _ in range(ranks)), strict=True)
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            port = int(os.read(readers[rank], 16))
            values = (rank, rank, ranks, ranks, 0, "127.0.0.1", port, True)
            os.environ.update(zip(_LAUNCHED, map(str, values), strict=True))
            _main()
        children[child] = rank
    # As torchrun's agent does, this process holds the store, of a port that nobody else can take; its threads come after the forks.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for writer in writers:
        os.write(writer, str(store.port).encode())
    sys.exit(_wait_for(children))


def _main() -> NoReturn:
    from rmoe_megatron.cli import main

    code: object = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _wait_for(children: dict[int, int]) -> int:
    """Return 0 or the first exit code that is none; as under torchrun, the other ranks end soon after."""
    failed, deadline = 0, float("inf")
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            del children[child]
            code = os.waitstatus_to_exitcode(status)
            if code and not failed:
                failed, deadline = code, time.monotonic() + 30
        elif time.monotonic() > deadline:
            for each in children:
                os.kill(each, signal.SIGKILL)
            deadline = float("inf")
        else:
            time.sleep(0.02)
    return failed
