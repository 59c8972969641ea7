"""A training run from configuration to last checkpoint: ``rmoe train`` and ``rmoe train --resume``."""

import logging
import os
import socket
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from rmoe_megatron.checkpoint.folders import (
    CheckpointFolder,
    begin_writing,
    checkpoint_path,
    list_checkpoints,
    pending_of,
    read_state,
    verify,
)
from rmoe_megatron.checkpoint.run_checkpoint import Progress, load_checkpoint
from rmoe_megatron.config.loading import load_config, to_yaml
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.diffusion.loss import DiffusionLoss
from rmoe_megatron.distributed.device import device_memory
from rmoe_megatron.distributed.launch import job_id, rank, ranks_on_host, world_size
from rmoe_megatron.distributed.process_groups import process_groups
from rmoe_megatron.engine.registry import build_engine
from rmoe_megatron.errors import Interrupted, RunError, UserError
from rmoe_megatron.files import atomic
from rmoe_megatron.files.disk_errors import message_of, warned
from rmoe_megatron.files.foreign_errors import reason
from rmoe_megatron.input_pipeline.batches import TrainingSource
from rmoe_megatron.model.build import build_chunks
from rmoe_megatron.model.precision.backend import resolve_precision
from rmoe_megatron.training import preflight
from rmoe_megatron.training.ema import ExponentialMovingAverage
from rmoe_megatron.training.fine_tuning import start_from_base
from rmoe_megatron.training.history import EventName, count_restarts, read_history, record
from rmoe_megatron.training.loop import TrainingLoop, finished
from rmoe_megatron.training.resuming import read_resumed
from rmoe_megatron.training.run_lock import exclusive
from rmoe_megatron.training.state import TrainingState

logger = logging.getLogger(__name__)


def train(config: RunConfig) -> None:
    """Train a new run in ``config.run_dir``.

    Raises:
        UserError: the configuration is wrong, or the folder already holds a run.
        Interrupted: the run was asked to stop and has saved.
    """
    config = resolve_precision(config)
    preflight.check(config, world_size())
    run_dir = Path(config.run_dir)
    _require_new(run_dir)
    _run(config, checkpoint=None, goes_on=False)


def _require_new(run_dir: Path) -> None:
    if list_checkpoints(run_dir):
        raise UserError(
            f"{run_dir} already holds checkpoints; continue it with `rmoe train --resume {run_dir}` "
            "or choose another run_dir."
        )


def resume(run_dir: Path, overrides: list[str]) -> None:
    """Continue a run from its newest complete checkpoint, with the configuration saved there.

    A run that was killed before its first save is started anew, with a warning that says so.

    Raises:
        UserError: there is no complete checkpoint, an override is wrong, or it changes the architecture.
        Interrupted: the run was asked to stop and has saved.
    """
    if not run_dir.is_dir():
        raise UserError(f"There is no run at {run_dir}; give the run_dir of an earlier `rmoe train`.")
    if (run_dir / "config.yaml").is_file() and not list_checkpoints(run_dir):
        logger.warning("%s has no checkpoint yet; it starts anew with the configuration there.", run_dir)
        config = resolve_precision(load_config(run_dir / "config.yaml", [*overrides, f"run_dir={run_dir}"]))
        preflight.check(config, world_size())
        _run(config, checkpoint=None, goes_on=True)
        return
    config, checkpoint = read_resumed(run_dir, overrides)
    preflight.check(config, world_size())
    # Of several ranks, the one that has done what was pending says so when all have met.
    pending = pending_of(checkpoint) if world_size() == 1 else read_state(checkpoint.path).get("pending")
    if checkpoint.step >= config.training.steps and not pending:
        if rank() == 0:
            print(finished(config))
        return
    _run(config, checkpoint, goes_on=True)


def _run(config: RunConfig, checkpoint: CheckpointFolder | None, goes_on: bool) -> None:
    """Train from ``checkpoint``, or from a newer one that there is by the time the folder is this process's; every rank calls it."""
    run_dir, is_rank0 = Path(config.run_dir), rank() == 0
    loop: TrainingLoop | None = None
    with exclusive(run_dir) if is_rank0 else nullcontext() as fence:
        if is_rank0:  # who had the folder before may have saved while this process waited or looked
            if not goes_on:
                _require_new(run_dir)
            begin_writing(run_dir)
            checkpoint = _newest(run_dir, checkpoint)
        first_step = checkpoint.step if checkpoint is not None else 0
        if is_rank0:
            record(run_dir, "started" if checkpoint is None else "resumed", first_step)
        try:
            with process_groups(config) as device:
                if is_rank0:
                    _write_down(config, run_dir)
                checkpoint = _that_of_rank0(run_dir, checkpoint)
                loop = _build(config, checkpoint, device)
                if fence is not None:
                    loop.restarts, loop.may_publish = count_restarts(read_history(run_dir)), fence.check
                stopped = _train(loop)
                step = loop.state.progress.step
        except BaseException as error:
            if fence is not None:
                fence.check()
                step = loop.state.progress.step if loop is not None else first_step
                _record(run_dir, "failed", step, message_of(error) or reason(error))
            raise
        if is_rank0:
            _record(run_dir, "finished" if stopped is None else "interrupted", step, stopped)
    if stopped is not None:
        raise Interrupted(
            f"{stopped}: {run_dir} stopped after step {step}; `rmoe train --resume {run_dir}` goes on."
        )


def _newest(run_dir: Path, checkpoint: CheckpointFolder | None) -> CheckpointFolder | None:
    """Return the newest whole checkpoint that is newer than ``checkpoint``, or ``checkpoint``."""
    known = checkpoint.step if checkpoint is not None else -1
    newer = (each for each in list_checkpoints(run_dir) if each.step > known)
    return next((each for each in newer if verify(each.path) is None), checkpoint)


def _that_of_rank0(run_dir: Path, checkpoint: CheckpointFolder | None) -> CheckpointFolder | None:
    """Return the checkpoint that rank 0 goes on from, on all ranks: they may have looked at different moments."""
    steps = [None if checkpoint is None else checkpoint.step]
    dist.broadcast_object_list(steps)
    step = steps[0]
    return None if step is None else CheckpointFolder(checkpoint_path(run_dir, step), step)


def _record(run_dir: Path, event: EventName, step: int, why: str | None) -> None:
    """Add the end of a run to its history, which can do without."""
    with warned(f"The history of {run_dir} lacks that it {event} at step {step}"):
        record(run_dir, event, step, why)


def _write_down(config: RunConfig, run_dir: Path) -> None:
    """Save the configuration in the run's folder, with a first line that says who has written it.

    A job that SLURM starts again resumes only what one of its own starts has written there.
    """
    writer = f"job {job_id()}" if job_id() is not None else f"process {os.getpid()} on {socket.gethostname()}"
    atomic.write(run_dir / "config.yaml", f"# written by {writer}\n{to_yaml(config)}")


def _build(config: RunConfig, checkpoint: CheckpointFolder | None, device: torch.device) -> TrainingLoop:
    """Build everything that trains, with its state from ``checkpoint`` or anew."""
    sharing = ranks_on_host() if device.type == "cpu" else 1
    preflight.check_memory(
        config, device_memory(device) // sharing, f"the {device.type.upper()} of rank {rank()}"
    )
    source = TrainingSource(config, device)
    modules = build_chunks(config, initialise=config.fine_tuning is None)
    fingerprint = start_from_base(modules, config) if config.fine_tuning is not None else None
    loss = DiffusionLoss(config, config.seed, source.null_conditions)
    engine = build_engine(config, modules.to(device), loss)
    decay, power = config.optimizer.ema_decay, config.optimizer.ema_power
    ema = ExponentialMovingAverage(engine.parameters, decay, power, engine.main_weights)
    state = TrainingState(engine, ema, Progress(), fingerprint)
    loop = TrainingLoop(config, state, source, device)
    if checkpoint is not None:
        started = time.monotonic()
        load_checkpoint(state, checkpoint)
        # The best guess of how long saving takes, until that is measured.
        loop.interruption.save_seconds = max(loop.interruption.save_seconds, time.monotonic() - started)
    return loop


def _train(loop: TrainingLoop) -> str | None:
    """Run the loop; returns why it stopped early, if it did. What ends it is told with its step."""
    progress, run_dir = loop.state.progress, loop.config.run_dir
    try:
        return loop.run()
    except RunError:
        raise
    except Exception as error:
        # PyTorch raises it from a signal handler, wherever the run is.
        if "DataLoader worker" in str(error):
            raise RunError(
                f"A data loading process of rank {rank()} ended at step {progress.step + 1} ({reason(error)}), perhaps for "
                f"want of memory; resume with `rmoe train --resume {run_dir}`, or with a smaller data.num_workers."
            ) from error
        error.add_note(f"Rank {rank()} was at step {progress.step + 1}.")
        raise
