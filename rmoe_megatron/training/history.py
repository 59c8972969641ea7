"""What became of a run, in order: started, interrupted, resumed, failed, finished (``RUN/history.jsonl``)."""

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, NotRequired, TypedDict

from pydantic import Field, TypeAdapter, with_config

from rmoe_megatron.distributed.launch import job_id, restart_count, world_size
from rmoe_megatron.errors import UserError
from rmoe_megatron.files.disk_errors import about
from rmoe_megatron.files.regular import open_to_append
from rmoe_megatron.files.untrusted import OPEN, lines_of, parse_json, read_text

HISTORY = "history.jsonl"
MAX_BYTES = 1 << 24

type EventName = Literal["started", "resumed", "interrupted", "failed", "finished"]


@with_config(OPEN)
class Event(TypedDict):
    """One line: what happened at which step, when, in which job."""

    event: EventName
    time: str  # ISO 8601, with the time zone
    step: Annotated[int, Field(ge=0)]
    ranks: Annotated[int, Field(ge=1)]
    why: NotRequired[str]
    job: NotRequired[str]  # SLURM's number
    restart: NotRequired[Annotated[int, Field(ge=0)]]  # how often SLURM had started the job again


EVENT = TypeAdapter(Event)


def record(run_dir: Path, event: EventName, step: int, why: str | None = None) -> None:
    """Add an event to a run's history and put it on the disk; one rank calls it, under the run's lock.

    Raises:
        UserError: what lies there is no file that a history can be.
    """
    line: Event = {
        "event": event,
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "step": step,
        "ranks": world_size(),
    }
    if why is not None:
        line["why"] = why
    job = job_id()
    if job is not None:
        line |= {"job": job, "restart": restart_count()}
    path = run_dir / HISTORY
    with about(path), open_to_append(path) as file:
        size = file.seek(0, os.SEEK_END)
        if size > MAX_BYTES:
            raise UserError(f"{path} has {size} bytes, too many for the history of a run; move it away.")
        torn = (
            size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
        )  # by a process that was killed in between
        file.write("\n" * torn + json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_history(run_dir: Path) -> list[Event]:
    """Return the events of a run; a line that a killed process left incomplete is passed over.

    Raises:
        UserError: the file cannot be read, or a whole line is no event.
    """
    path = run_dir / HISTORY
    if not os.path.lexists(path):
        return []
    lines = lines_of(read_text(path, MAX_BYTES))
    whole = [(number, line) for number, line in enumerate(lines, start=1) if line.endswith("}")]
    return [parse_json(line, EVENT, f"Line {number} of {path}") for number, line in whole]


def count_restarts(history: list[Event]) -> int:
    """Return how often a run was started again."""
    return max(sum(event["event"] in ("started", "resumed") for event in history) - 1, 0)
