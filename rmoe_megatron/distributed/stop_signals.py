"""Signals that ask a process to stop are noted where they arrive; the run acts on them where it can save.

SLURM and schedulers like it send SIGTERM when a job is preempted and, if asked to, SIGUSR1 before its time is up. They
signal every process of a job's step, those that load data too. A terminal that is closed sends SIGHUP to what runs in it, Ctrl-C
in a terminal sends SIGINT.
"""

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType

from rmoe_megatron.distributed import launch

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
PATIENCE = 5.0  # seconds; a later SIGTERM is meant for a process that cannot get to where it would stop
CTRL_C = 130  # exit code of what SIGINT ends: 128 and its number, as shells say it

received: list[tuple[str, float]] = []  # names, and when they came


def listen() -> None:
    """Note the signals from now on; called before anything slow is imported.

    SIGHUP stays ignored under ``nohup``, and SIGINT where a script has started the run in the background.
    """
    for number in SIGNALS:
        may_be_ignored = number in (signal.SIGHUP, signal.SIGINT)
        if not may_be_ignored or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    now, name = time.monotonic(), signal.Signals(number).name
    if number == signal.SIGTERM and received and now - received[0][1] > PATIENCE:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    is_second = number == signal.SIGINT and name in [each for each, _ in received]
    received.append((name, now))  # before anything is said: the next signal may come meanwhile
    if is_second:
        _say("Ctrl-C came twice: the run ends at once, with the checkpoints that it has.")
        os._exit(CTRL_C)
    if number == signal.SIGINT:
        _say("Ctrl-C: the run saves where it is and ends; a second Ctrl-C ends it at once.")


def _say(line: str) -> None:
    """Write a line at once; a signal may have come in the middle of a write to ``sys.stderr``."""
    if launch.is_main_process():
        with suppress(OSError):  # nobody reads what the run says
            os.write(2, f"\n{line}\n".encode())


def heed_parent_alone() -> None:
    """End a data loading process at SIGTERM from its parent, as PyTorch ends it, but not from SLURM: the run still needs it."""
    for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, daemon=True, name="end-with-parent").start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
