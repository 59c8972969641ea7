"""Checkpoint folders of a run: published whole by a rename, verified before use, old ones removed.

``RUN/checkpoints/step-00000500`` holds Megatron-Core's torch_dist files, ``config.yaml``, ``run_state.json`` and
``manifest.json`` with the size and SHA-256 of every other file. A folder is written under a name that ends in
``.partial`` and renamed when everything is on the disk.
"""

import hashlib
import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmoe_megatron import durable
from rmoe_megatron.checkpoint.unpickling import METADATA, find_untrusted
from rmoe_megatron.errors import UserError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
REQUIRED = {METADATA, "config.yaml", "run_state.json", "metadata.json"}
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class CheckpointFolder:
    """A published checkpoint."""

    path: Path
    step: int


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return where the checkpoint of ``step`` is published."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run_dir: Path) -> list[CheckpointFolder]:
    """Return the published checkpoints of a run, newest first; unfinished ones have other names."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    matches = [(path, _NAME.fullmatch(path.name)) for path in folder.iterdir()]
    found = [CheckpointFolder(path, int(match.group(1))) for path, match in matches if match]
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
                logger.warning("%s; using %s instead.", "; ".join(damaged), checkpoint.path)
            return checkpoint
        damaged.append(problem)
    reason = "; ".join(damaged) or "nothing has been saved there yet"
    raise UserError(
        f"{run_dir} has no complete checkpoint ({reason}); start the run anew with `rmoe train CONFIG`."
    )


def verify(path: Path) -> str | None:
    """Return None if the checkpoint is whole and nothing in it can execute, else one clause saying what is wrong.

    Whole: the manifest lists every file of the folder, and each is there with its size and checksum.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return f"{path} is half-written (no readable {MANIFEST})"
    found = {str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir()} - {MANIFEST}
    unlisted = sorted((found | REQUIRED) - expected.keys())
    if unlisted:
        return f"{path} is damaged ({unlisted[0]} is not in {MANIFEST})"
    for name, (size, sha256) in expected.items():
        file = path / name
        if name not in found or not file.is_file() or file.stat().st_size != size:
            return f"{path} is half-written ({name} is missing or has the wrong size)"
        if _sha256(file) != sha256:
            return f"{path} is damaged ({name} fails its checksum)"
    return find_untrusted(path)


def publish(partial: Path, final: Path) -> None:
    """Write the manifest of a finished ``partial`` folder, put everything on the disk and rename it to ``final``."""
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    manifest = {
        str(file.relative_to(partial)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in files
    }
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*files, partial / MANIFEST, partial]:
        durable.sync(path)
    if final.exists():
        shutil.rmtree(final)  # a damaged checkpoint of the same step, passed over at resume
    partial.rename(final)
    durable.sync(final.parent)


def read_state(path: Path) -> dict[str, Any]:
    """Return ``run_state.json`` of a checkpoint: step, samples, and what else belongs to its kind."""
    return json.loads((path / "run_state.json").read_text())


def remove_old(run_dir: Path, keep_last: int) -> None:
    """Remove all but the newest ``keep_last`` checkpoints, and what unfinished saves left."""
    for checkpoint in list_checkpoints(run_dir)[keep_last:]:
        shutil.rmtree(checkpoint.path)
    for partial in (run_dir / "checkpoints").glob("*.partial"):
        shutil.rmtree(partial)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
