"""A training run from configuration to last checkpoint: ``rmoe train`` and ``rmoe train --resume``."""

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from rmoe_megatron import durable
from rmoe_megatron.checkpoint.folders import CheckpointFolder, find_checkpoint, list_checkpoints, read_state
from rmoe_megatron.checkpoint.state import Progress, TrainingState, load_checkpoint, save_checkpoint
from rmoe_megatron.config.loading import load_config, save_config
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.errors import RunFailure, UserError
from rmoe_megatron.launch import rank, ranks_on_host, world_size
from rmoe_megatron.model.parameters import check_memory
from rmoe_megatron.parallel import process_groups
from rmoe_megatron.pictures import png
from rmoe_megatron.platform import device_memory
from rmoe_megatron.training import preflight
from rmoe_megatron.training.ema import ExponentialMovingAverage
from rmoe_megatron.training.health import Health
from rmoe_megatron.training.logging import RunLogger
from rmoe_megatron.training.routing import load_balancing_loss
from rmoe_megatron.training.run_lock import exclusive
from rmoe_megatron.training.samples import SampleGrid
from rmoe_megatron.training.setup import build_model, build_optimizer
from rmoe_megatron.training.source import TrainingSource
from rmoe_megatron.training.step import StepResult, TrainingStep
from rmoe_megatron.training.throughput import Throughput

logger = logging.getLogger(__name__)


def train(config: RunConfig) -> None:
    """Train a new run in ``config.run_dir``.

    Raises:
        UserError: the configuration is wrong, or the folder already holds a run.
    """
    preflight.check(config, world_size())
    run_dir = Path(config.run_dir)
    if list_checkpoints(run_dir):
        raise UserError(
            f"{run_dir} already holds checkpoints; continue it with `rmoe train --resume {run_dir}` "
            "or choose another run_dir."
        )
    _run(config, checkpoint=None)


def resume(run_dir: Path, overrides: list[str]) -> None:
    """Continue a run from its newest complete checkpoint, with the configuration saved there.

    A run that was killed before its first save is started anew, with a warning that says so.

    Raises:
        UserError: there is no complete checkpoint, an override is wrong, or it changes the architecture.
    """
    if not run_dir.is_dir():
        raise UserError(f"There is no run at {run_dir}; give the run_dir of an earlier `rmoe train`.")
    if (run_dir / "config.yaml").is_file() and not list_checkpoints(run_dir):
        logger.warning("%s has no checkpoint yet; it starts anew with the configuration there.", run_dir)
        train(load_config(run_dir / "config.yaml", [*overrides, f"run_dir={run_dir}"]))
        return
    checkpoint = find_checkpoint(run_dir)
    if read_state(checkpoint.path).get("imported"):
        raise UserError(
            f"{run_dir} holds imported weights and no training state; start a run with fine_tuning.base={run_dir}."
        )
    saved = load_config(checkpoint.path / "config.yaml", [])
    config = load_config(checkpoint.path / "config.yaml", [*overrides, f"run_dir={run_dir}"])
    if config.fine_tuning and saved.fine_tuning:
        saved.fine_tuning.base = config.fine_tuning.base  # it may have moved; its fingerprint is checked
    for section in ("model", "recurrence", "lora", "fine_tuning"):
        if getattr(config, section) != getattr(saved, section):
            raise UserError(
                f"The checkpoint {checkpoint.path} has another architecture ({section} differs from what is asked "
                f"for); resume without overriding {section}, or train a new run."
            )
    for key, asked, kept in (
        ("precision", config.precision, saved.precision),
        ("diffusion.objective", config.diffusion.objective, saved.diffusion.objective),
        ("diffusion.prediction", config.diffusion.prediction, saved.diffusion.prediction),
    ):
        if asked != kept:
            raise UserError(
                f"{checkpoint.path} was trained with {key}={kept.value}, which its weights depend on; resume without "
                "overriding it, or train a new run."
            )
    if config.optimizer.distributed_optimizer != saved.optimizer.distributed_optimizer:
        raise UserError(
            f"{checkpoint.path} was saved with optimizer.distributed_optimizer="
            f"{str(saved.optimizer.distributed_optimizer).lower()}, whose state the other optimizer cannot read; "
            "resume without overriding it."
        )
    preflight.check(config, world_size())
    if checkpoint.step >= config.training.steps:
        logger.warning("%s is finished: step %d of %d.", run_dir, checkpoint.step, config.training.steps)
        return
    _run(config, checkpoint)


def _run(config: RunConfig, checkpoint: CheckpointFolder | None) -> None:
    run_dir, is_rank0 = Path(config.run_dir), rank() == 0
    with exclusive(run_dir) if is_rank0 else nullcontext(), process_groups(config) as device:
        if is_rank0:
            save_config(config, run_dir / "config.yaml")
        sharing = ranks_on_host() if device.type == "cpu" else 1
        check_memory(config, device_memory(device) // sharing, f"the {device.type.upper()} of rank {rank()}")
        source = TrainingSource(config, device)
        model, base_fingerprint = build_model(config, device)
        optimizer, scheduler = build_optimizer(config, model)
        ema = ExponentialMovingAverage(model.modules, config.optimizer.ema_decay, config.optimizer.ema_power)
        state = TrainingState(model.modules, optimizer, scheduler, ema, Progress(), base_fingerprint)
        if checkpoint is not None:
            load_checkpoint(state, checkpoint)
        step = TrainingStep(config, model, optimizer, scheduler, source.null_conditions)
        try:
            TrainingLoop(config, state, step, source, device).run()
        except RunFailure:
            raise
        except Exception as error:
            error.add_note(f"Rank {rank()} was at step {state.progress.step + 1}.")
            raise


@dataclass
class TrainingLoop:
    """Steps, validates, saves, draws; until the configured number of steps is done."""

    config: RunConfig
    state: TrainingState
    step: TrainingStep
    source: TrainingSource
    device: torch.device
    averages_due: int | None = None  # the update whose parameters the averages have not seen yet

    def run(self) -> None:
        """Train from ``state.progress`` to the last step."""
        training, progress = self.config.training, self.state.progress
        run_dir = Path(self.config.run_dir)
        log = RunLogger(
            run_dir, self.config.logging, training.steps, progress.step, is_rank0=dist.get_rank() == 0
        )
        grid = None
        if training.sample_prompts:
            prompts = self.source.encode_prompts(training.sample_prompts)
            grid = SampleGrid(self.config, prompts, self.source.autoencoder)
        batches = self.source.training_batches(progress.samples)
        health = Health(run_dir, self.step.model.modules, self.source.locate, training.max_skipped_steps)
        throughput = Throughput(self.config, self.device)
        self.step.model.train()
        while progress.step < training.steps:
            result = self.step(batches, before_update=self.update_averages)
            if result.suspects is None:
                self.averages_due = progress.step
            progress.step += 1
            progress.samples += training.global_batch_size
            progress.skipped_steps += result.suspects is not None
            throughput.count(training.global_batch_size)
            balance = load_balancing_loss(self.config, self.step.num_micro_batches, self.device)
            if self.is_due(training.log_every):
                metrics = self.metrics(result) | balance | throughput.rates()
                log.log_metrics(progress.step, metrics, throughput.remaining(training.steps - progress.step))
            health.check(progress.step, result.loss, result.grad_norm, result.suspects)
            self.look_and_save(log, grid, throughput)
        log.close()

    def look_and_save(self, log: RunLogger, grid: SampleGrid | None, throughput: Throughput) -> None:
        """Validate, save and sample where it is time to; what fails in sampling has been saved before."""
        training, run_dir, step = self.config.training, Path(self.config.run_dir), self.state.progress.step
        everies = (training.validate_every, training.sample_every, self.config.checkpoint.every)
        if any(self.is_due(every) for every in everies):
            self.step.model.gather_parameters()
            self.update_averages()
        if self.source.has_validation and self.is_due(training.validate_every):
            with throughput.paused("validation", training.validate_every):
                log.log_metrics(step, {"validation_loss": self.validate()})
        if self.is_due(self.config.checkpoint.every):
            with throughput.paused("saving", self.config.checkpoint.every):
                save_checkpoint(self.state, self.config, run_dir)
                log.draw_curves()
        if grid is not None and self.is_due(training.sample_every):
            with throughput.paused("sampling", training.sample_every):
                log.log_image("samples", self.sample(grid, run_dir), step)

    def is_due(self, every: int) -> bool:
        """Whether it is time for what happens every so many steps and after the last."""
        step = self.state.progress.step
        return step % every == 0 or step == self.config.training.steps

    def metrics(self, result: StepResult) -> dict[str, float]:
        """Return what is logged of a step."""
        return {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "samples": self.state.progress.samples,
            "skipped_steps": self.state.progress.skipped_steps,
        }

    def update_averages(self) -> None:
        """Let the averages see the parameters of the last update, once these are here."""
        if self.averages_due is not None:
            self.state.ema.update(self.averages_due)
            self.averages_due = None

    def validate(self) -> float:
        """Return the loss of the averaged weights on the validation samples, with noise that is the same each time."""
        batches, count = self.source.validation_batches()
        with self.state.ema.applied():
            return self.step.evaluate(batches, count)

    def sample(self, grid: SampleGrid, run_dir: Path) -> Path:
        """Draw the sample grid with the averaged weights; every rank computes, rank 0 writes."""
        self.step.model.train(False)
        with self.state.ema.applied():
            image = grid.draw(self.step.denoise)
        self.step.model.train()
        path = run_dir / "samples" / f"step-{self.state.progress.step:08d}.png"
        if dist.get_rank() == 0:
            path.parent.mkdir(exist_ok=True)
            durable.write(path, png(image))
        return path
