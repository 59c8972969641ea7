"""What is left of a run: its checkpoints, whole or not, and how it was started, interrupted and resumed: ``rmoe inspect``."""

from collections.abc import Iterator
from pathlib import Path

from rmoe_megatron.checkpoint.folders import (
    CheckpointFolder,
    list_checkpoints,
    pending_of,
    read_state,
    verify,
)
from rmoe_megatron.errors import UserError
from rmoe_megatron.training.history import count_restarts, read_history


def show_run(run_dir: Path, quick: bool = False) -> Iterator[str]:
    """Describe a run line by line; every checkpoint is read and compared with its checksums.

    Args:
        quick: leave the checksums out, which take as long as reading the checkpoints does.

    Raises:
        UserError: there is no such run, or a file of it is not what it should be.
    """
    checkpoints, history = list_checkpoints(run_dir), read_history(run_dir)
    if not checkpoints and not history:
        raise UserError(f"There is no run at {run_dir}; give the run_dir of an earlier `rmoe train`.")
    yield f"checkpoints  {len(checkpoints)}, newest first" if checkpoints else "checkpoints  none"
    for checkpoint in checkpoints:
        is_newest = checkpoint == checkpoints[0]  # the others were followed by what was to follow them
        problem = None if quick else verify(checkpoint.path)
        size = sum(file.stat().st_size for file in checkpoint.path.rglob("*") if file.is_file())
        judgement = "not verified" if quick else problem or f"verified{_describe(checkpoint, is_newest)}"
        yield f"  step {checkpoint.step:>8}  {size / 1e9:8.3f} GB  {judgement}"
    yield f"restarts     {count_restarts(history)}"
    for event in history:
        job = f"  job {event['job']}.{event.get('restart', 0)}" if "job" in event else ""
        why = f"  {event['why']}" if "why" in event else ""
        ranks = "1 rank" if event["ranks"] == 1 else f"{event['ranks']} ranks"
        yield f"  {event['time']}  {event['event']:<11} step {event['step']:>8}  {ranks}{job}{why}"


def _describe(checkpoint: CheckpointFolder, is_newest: bool) -> str:
    pending = pending_of(checkpoint) if is_newest else []
    words = ", imported weights" if read_state(checkpoint.path).get("imported") else ""
    return words + (f", {' and '.join(pending)} still to come" if pending else "")
