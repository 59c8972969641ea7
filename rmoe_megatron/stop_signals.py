"""Signals that ask a process to stop are noted where they arrive; the run acts on them where it can save.

SLURM and schedulers like it send SIGTERM when a job is preempted and, if asked to, SIGUSR1 before its time is up. They
signal every process of a job's step, those that load data too. A terminal that is closed sends SIGHUP to what runs in it.
"""

import os
import signal
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
PATIENCE = 5.0  # seconds; a later SIGTERM is meant for a process that cannot get to where it would stop

received: list[tuple[str, float]] = []  # names, and when they came


def listen() -> None:
    """Note the signals from now on; called before anything slow is imported. SIGHUP stays ignored under ``nohup``."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if number == signal.SIGTERM and received and now - received[0][1] > PATIENCE:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    received.append((signal.Signals(number).name, now))


def heed_parent_alone() -> None:
    """End a data loading process at SIGTERM from its parent, as PyTorch ends it, but not from SLURM: the run still needs it."""
    for number in (signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, daemon=True, name="end-with-parent").start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
