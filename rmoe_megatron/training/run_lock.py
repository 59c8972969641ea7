"""One process group trains in a run folder at a time: two would overwrite each other's log and checkpoints."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from rmoe_megatron.errors import UserError

LOCK = "run.lock"


@contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Hold the run folder for the duration of the context; rank 0 calls it for all.

    The lock belongs to this process alone, not to its children, and the system lets go of it when the process dies: a
    lock file left behind by a killed run is no obstacle.

    Raises:
        UserError: another process holds it; says which.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK).open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise UserError(
                f"{run_dir} is in use by {_holder(file.read())}; wait for it, stop it, or choose another run_dir."
            ) from error
        file.truncate(0)
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "started": started}, file)
        file.flush()
        yield
        file.truncate(0)


def _holder(content: str) -> str:
    try:
        holder = json.loads(content)
        return f"process {holder['pid']} on {holder['host']} since {holder['started']}"
    except (ValueError, KeyError, TypeError):
        return "another process"  # which has not written who it is yet
