"""Claims: small files that say which process is at work on something, so that another one leaves it alone and can say who is at it.

A claim is created by one process alone, and a thread of that process keeps it young. It is void when its process has died on this
host, or when nobody has kept it young for a while: then its host is gone, too. Claims need no locks of the file system, which not
every cluster has. How old one is the file system's clock says, which dates it, and not this host's.
"""

import logging
import os
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rmoe_megatron.errors import UserError
from rmoe_megatron.files.disk_errors import about

logger = logging.getLogger(__name__)

HEARTBEAT = 10.0  # seconds
LEASE = 60.0  # seconds after which a claim that nobody keeps young is void
# The same where the whole work is thrown away should it be done twice; a large file may be written while no thread gets a turn.
LONG_LEASE = 600.0
_held: set[Path] = set()  # by this process, which may have the number of one that died
TAKEOVER = 10.0  # seconds after which one who was about to remove a void claim, or to write a new one, has died over it
CLOCK = 30.0  # seconds for which the difference between two clocks is believed
# Of folders: when their file system was asked for the time, and how far it was ahead.
_clocks: dict[Path, tuple[float, float]] = {}


def this_process() -> str:
    """Return how claims call this process: host and number."""
    return f"{socket.gethostname()} {os.getpid()}"


def take(path: Path, lease: float = LEASE) -> bool:
    """Claim ``path`` for this process; returns whether it has the claim now.

    Raises:
        FileNotFoundError: its folder is not there.
    """
    if _create(path):
        return True
    if not is_void(path, lease):
        return False
    # One process removes a void claim, and looks again before it does: another may have removed it and claimed anew.
    remover = path.with_name(f"{path.name}.void")
    if not _create(remover):
        if is_void(remover, TAKEOVER):
            remover.unlink(missing_ok=True)
        return False
    try:
        if is_void(path, lease):
            path.unlink(missing_ok=True)
        return _create(path)
    finally:
        remover.unlink(missing_ok=True)


def release(path: Path) -> None:
    """Give a claim up, if it is still this process's."""
    _held.discard(path.absolute())
    if holder(path) == this_process():
        path.unlink(missing_ok=True)


def holder(path: Path) -> str:
    """Return whose claim it is, as :func:`this_process` says it; an empty text if nobody's or not yet written."""
    try:
        return _read(path)[0]
    except FileNotFoundError:
        return ""


def _read(path: Path) -> tuple[str, float]:
    """Return whose claim it is, and when it was touched last; of what is no file an empty text and 0."""
    if not stat.S_ISREG(path.lstat().st_mode):  # a pipe would keep who reads it waiting
        return "", 0.0
    with path.open(
        errors="replace"
    ) as file:  # a network file system shows the last touch to who opens a file
        return file.read(300), os.fstat(file.fileno()).st_mtime


def is_void(path: Path, lease: float = LEASE) -> bool:
    """Whether there is a claim that nobody stands behind any more."""
    try:
        name, touched = _read(path)
    except FileNotFoundError:
        return False
    host, _, process = name.partition(" ")
    if name == this_process() and path.absolute() not in _held:
        return True
    age = now(path.parent) - touched
    return is_dead(host, process) or age > (lease if name else TAKEOVER)


def now(folder: Path) -> float:
    """Return the time, in seconds since 1970, that what is written in ``folder`` is dated by: its server's."""
    asked, ahead = _clocks.get(folder, (-CLOCK, 0.0))
    if time.monotonic() - asked >= CLOCK:
        with suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
            ahead = os.fstat(file.fileno()).st_mtime - time.time()
        _clocks[folder] = time.monotonic(), ahead
    return time.time() + ahead


def is_dead(host: str, process: str) -> bool:
    """Whether a process is known to have ended: of this host, for those of others are not seen."""
    if host != socket.gethostname() or not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False


@contextmanager
def kept_young(path: Path) -> Iterator[None]:
    """Touch a claim until the context ends."""
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(HEARTBEAT):
            with suppress(OSError):
                os.utime(path)

    threading.Thread(target=touch, daemon=True, name="claim").start()
    try:
        yield
    finally:
        ended.set()


@contextmanager
def only_process(path: Path, what: str) -> Iterator[None]:
    """Hold the claim ``path`` for the duration of the context.

    Args:
        what: how a message calls what is claimed, with its verb: ``runs/x is being written``.

    Raises:
        UserError: another process holds it; says which.
    """
    # Who has just made it soon writes who it is; one whose disk did not let it has left a claim that is void a little later.
    deadline = time.monotonic() + TAKEOVER + 1
    while not (is_mine := take(path, LONG_LEASE)) and not holder(path) and time.monotonic() < deadline:
        time.sleep(0.1)
    if not is_mine:
        host, _, process = holder(path).partition(" ")
        name = f"process {process} on {host}" if process else "another process"
        here = socket.gethostname()
        gone = f" (if {host} is gone, ten minutes after that)" if process and host != here else ""
        raise UserError(f"{what} by {name}; wait for its end{gone}, or choose another folder.")
    try:
        with kept_young(path):
            yield
    finally:
        try:
            release(path)
        except OSError as error:
            logger.warning("%s stays, which nobody needs any more (%s); remove it.", path, error.strerror)


def _create(path: Path) -> bool:
    """Create a claim of this process, unless somebody has one."""
    try:
        file = path.open("x")
    except FileExistsError:
        return False
    try:
        with about(path), file:
            file.write(this_process())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    _held.add(path.absolute())
    return True
