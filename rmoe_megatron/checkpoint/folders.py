"""Checkpoint folders of a run: published whole by a rename, verified before use, old ones removed.

``RUN/checkpoints/step-00000500`` holds Megatron-Core's torch_dist files, ``config.yaml``, ``run_state.json`` and
``manifest.json`` with the size and SHA-256 of every other file. A folder is written under a name that ends in
``.partial`` and renamed when everything is on the disk. What is to follow the newest one, such as samples of its weights, and is not
done yet, stands beside the folders in ``pending.json``.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

from pydantic import Field, TypeAdapter, with_config

from rmoe_megatron.checkpoint.unpickling import METADATA, find_untrusted
from rmoe_megatron.config.run import CheckpointConfig
from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic
from rmoe_megatron.files.disk_errors import sentence
from rmoe_megatron.files.regular import check_subfolder, open_regular
from rmoe_megatron.files.untrusted import CLOSED, OPEN, read_json

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PENDING = "pending.json"
MAX_NAMED = 3  # damaged checkpoints in a sentence
REQUIRED = {METADATA, "config.yaml", "run_state.json", "metadata.json"}
_NAME = re.compile(r"step-(\d{8})")


Pause = Annotated[str, Field(pattern=r"^(validation|samples|evaluation \w{1,40})$")]


@with_config(CLOSED)
class Pending(TypedDict):
    """``pending.json``: what is left of ``pending`` of the checkpoint of ``step``."""

    step: int
    pending: list[Pause]


@with_config(CLOSED)
class ManifestEntry(TypedDict):
    """What the manifest says of one file."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@with_config(OPEN)
class RunState(TypedDict):
    """``run_state.json``: optimizer steps done, samples drawn, and what belongs to the kind of checkpoint.

    ``pending`` is what this step was still to be followed by, before the next, when it was saved; see :func:`pending_of`.
    """

    step: Annotated[int, Field(ge=0, lt=100_000_000)]
    samples: Annotated[int, Field(ge=0, lt=1 << 40)]
    skipped_steps: NotRequired[Annotated[int, Field(ge=0)]]
    pending: NotRequired[list[Pause]]
    imported: NotRequired[bool]  # weights alone
    source: NotRequired[Annotated[str, Field(max_length=200)]]  # of an imported run; conversion/origin.py
    is_repository: NotRequired[bool]
    licence: NotRequired[Annotated[dict[str, str], Field(max_length=3)]]
    job: NotRequired[str]  # SLURM's number of the job that saved it
    base_fingerprint: NotRequired[Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]
    validation_loss: NotRequired[
        float | None
    ]  # of the averaged weights, if this step was validated before it was saved


MANIFEST_MODEL = TypeAdapter(dict[str, ManifestEntry])
RUN_STATE = TypeAdapter(RunState)
_PENDING = TypeAdapter(Pending)


@dataclass(frozen=True)
class CheckpointFolder:
    """A published checkpoint."""

    path: Path
    step: int


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return where the checkpoint of ``step`` is published."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run_dir: Path) -> list[CheckpointFolder]:
    """Return the published checkpoints of a run, newest first; unfinished ones have other names.

    Raises:
        UserError: a file lies where a folder belongs, or a link that leads out of the run's folder.
    """
    folder = run_dir / "checkpoints"
    if not os.path.lexists(folder):
        return []
    try:
        matches = [(path, _NAME.fullmatch(path.name)) for path in folder.iterdir()]
    except OSError as error:
        raise UserError(
            f"{folder} is no folder of checkpoints ({error.strerror}); move it away or choose another run."
        ) from error
    check_subfolder(folder, run_dir)
    found = [CheckpointFolder(path, int(match.group(1))) for path, match in matches if match]
    for checkpoint in found:
        if not checkpoint.path.is_dir():
            raise UserError(f"{checkpoint.path} is no folder, as a checkpoint is; move it away.")
        check_subfolder(checkpoint.path, run_dir)
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


def find_checkpoint(run_dir: Path, step: int | None = None) -> CheckpointFolder:
    """Return the newest complete checkpoint of a run, or that of ``step``.

    Damaged checkpoints are passed over with a warning that says which one is used instead.

    Raises:
        UserError: there is no complete checkpoint, or that of ``step`` is missing or damaged.
    """
    checkpoints = list_checkpoints(run_dir)
    if step is not None:
        checkpoints = [checkpoint for checkpoint in checkpoints if checkpoint.step == step]
        if not checkpoints:
            raise UserError(f"{run_dir} has no checkpoint of step {step}; see {run_dir / 'checkpoints'}.")
    damaged: list[str] = []
    for checkpoint in checkpoints:
        problem = verify(checkpoint.path)
        if problem is None:
            if damaged:
                logger.warning("%s; using %s instead.", _first_of(damaged), checkpoint.path)
            return checkpoint
        damaged.append(problem)
    reason = _first_of(damaged) or "nothing has been saved there yet"
    raise UserError(
        f"{run_dir} has no complete checkpoint ({reason}); start the run anew with `rmoe train CONFIG`."
    )


def _first_of(problems: list[str]) -> str:
    more = f"; and {len(problems) - MAX_NAMED} more like these" if len(problems) > MAX_NAMED else ""
    return "; ".join(problems[:MAX_NAMED]) + more


def verify(path: Path) -> str | None:
    """Return None if the checkpoint is whole and nothing in it can execute, else one clause saying what is wrong.

    Whole: the manifest lists every file of the folder, and each is there with its size and checksum.
    """
    try:
        manifest = read_json(path / MANIFEST, MANIFEST_MODEL)
    except UserError as error:
        return f"{path} is half-written (no readable {MANIFEST}: {str(error).rstrip('.')})"
    expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    found = {str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir()} - {MANIFEST}
    unlisted = sorted((found | REQUIRED) - expected.keys())
    if unlisted:
        return f"{path} is damaged ({unlisted[0]} is not in {MANIFEST})"
    for name, (size, sha256) in expected.items():
        file = path / name
        if name not in found or not file.is_file() or file.stat().st_size != size:
            return f"{path} is half-written ({name} is missing or has the wrong size)"
        try:
            if _sha256(file) != sha256:
                return f"{path} is damaged ({name} fails its checksum)"
        except UserError as error:
            return f"{path} is damaged ({str(error).rstrip('.')})"
    return find_untrusted(path)


def write_manifest(folder: Path) -> None:
    """Write down size and checksum of every file of a finished checkpoint."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    manifest = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in files
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def read_state(path: Path) -> RunState:
    """Return ``run_state.json`` of a checkpoint.

    Raises:
        UserError: the file is malformed.
    """
    return read_json(path / "run_state.json", RUN_STATE)


def pending_of(checkpoint: CheckpointFolder) -> list[str]:
    """Return what a checkpoint is still to be followed by.

    Raises:
        UserError: a file is malformed.
    """
    pending, path = read_state(checkpoint.path).get("pending", []), checkpoint.path.with_name(PENDING)
    if pending and os.path.lexists(path):
        left = read_json(path, _PENDING)
        if left["step"] == checkpoint.step:
            return left["pending"]
    return pending


def write_pending(run_dir: Path, step: int, pending: list[str]) -> None:
    """Put down what is left of ``pending`` of the checkpoint of ``step``, the newest."""
    path = checkpoint_path(run_dir, step).with_name(PENDING)
    atomic.write(path, json.dumps({"step": step, "pending": pending}))


def forget_pending(run_dir: Path) -> None:
    """Remove what was put down of a checkpoint, before another one, perhaps of the same step, takes its place."""
    (run_dir / "checkpoints" / PENDING).unlink(missing_ok=True)


def remove_old(run_dir: Path, settings: CheckpointConfig, step: int) -> None:
    """Remove all checkpoints up to ``step`` but those that ``settings`` keep, and what unfinished saves left.

    What cannot be removed is warned of; it is tried again at the next save.

    Args:
        step: just saved. A checkpoint of a later one was damaged and passed over at resume: it keeps no other out.
    """
    try:
        up_to_now = [checkpoint for checkpoint in list_checkpoints(run_dir) if checkpoint.step <= step]
        kept = {*up_to_now[: settings.keep_last], *_best(up_to_now, settings.keep_best)}
        for checkpoint in up_to_now:
            is_milestone = settings.keep_every is not None and checkpoint.step % settings.keep_every == 0
            if checkpoint not in kept and not is_milestone:
                # What is removed in part has no final name; the next save removes the rest.
                atomic.remove(
                    checkpoint.path.rename(
                        checkpoint.path.with_name(f"{checkpoint.path.name}.removed.partial")
                    )
                )
        _remove_unfinished(run_dir)
    except OSError as error:
        logger.warning("Old checkpoints stay for now: %s", sentence(error))


def _best(checkpoints: Sequence[CheckpointFolder], count: int) -> list[CheckpointFolder]:
    """Return those of the least validation loss, of equal ones the newer; a checkpoint whose step was not validated is none."""
    losses = {}
    for checkpoint in checkpoints if count else ():
        with suppress(UserError):  # a damaged one has no loss
            loss = read_state(checkpoint.path).get("validation_loss")
            if loss is not None:
                losses[checkpoint] = loss
    return sorted(losses, key=lambda each: (losses[each], -each.step))[:count]


def begin_writing(run_dir: Path) -> None:
    """Remove what is unfinished, before a run writes: who holds the run's lock waits for nobody else.

    A claim of a process on a lost node would else look alive for minutes.
    """
    try:
        _remove_unfinished(run_dir)
    except OSError as error:
        logger.warning("What an unfinished save left stays for now: %s", sentence(error))


def _remove_unfinished(run_dir: Path) -> None:
    for name in ("*.partial", "*.claim"):
        for left in (run_dir / "checkpoints").glob(name):
            atomic.remove(left)


def _sha256(file: Path) -> str:
    with open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
