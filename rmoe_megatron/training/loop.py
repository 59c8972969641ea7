"""What happens in which step of a run: training, validation, saving, sampling, logging."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from rmoe_megatron import durable
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.engine.protocol import StepResult
from rmoe_megatron.pictures import png
from rmoe_megatron.training.health import Health
from rmoe_megatron.training.logging import RunLogger
from rmoe_megatron.training.samples import SampleGrid
from rmoe_megatron.training.source import TrainingSource
from rmoe_megatron.training.state import TrainingState, save_checkpoint
from rmoe_megatron.training.throughput import Throughput


@dataclass
class TrainingLoop:
    """Steps, validates, saves, draws; until the configured number of steps is done."""

    config: RunConfig
    state: TrainingState
    source: TrainingSource
    device: torch.device
    averages_due: int | None = None  # the update whose parameters the averages have not seen yet

    def run(self) -> None:
        """Train from ``state.progress`` to the last step."""
        training, progress, engine = self.config.training, self.state.progress, self.state.engine
        run_dir = Path(self.config.run_dir)
        log = RunLogger(
            run_dir, self.config.logging, training.steps, progress.step, is_rank0=dist.get_rank() == 0
        )
        grid = None
        if training.sample_prompts:
            prompts = self.source.encode_prompts(training.sample_prompts)
            grid = SampleGrid(self.config, prompts, self.source.autoencoder)
        batches = self.source.training_batches(progress.samples)
        health = Health(run_dir, engine.modules, self.source.locate, training.max_skipped_steps)
        throughput = Throughput(self.config, self.device)
        while progress.step < training.steps:
            result = engine.step(batches, before_update=self.update_averages)
            if result.suspects is None:
                self.averages_due = progress.step
            progress.step += 1
            progress.samples += training.global_batch_size
            progress.skipped_steps += result.suspects is not None
            throughput.count(training.global_batch_size)
            routing = engine.routing_metrics()
            if self.is_due(training.log_every):
                metrics = self.metrics(result) | routing | throughput.rates()
                log.log_metrics(progress.step, metrics, throughput.remaining(training.steps - progress.step))
            health.check(progress.step, result)
            self.look_and_save(log, grid, throughput)
        log.close()

    def look_and_save(self, log: RunLogger, grid: SampleGrid | None, throughput: Throughput) -> None:
        """Validate, save and sample where it is time to; what fails in sampling has been saved before."""
        training, run_dir, step = self.config.training, Path(self.config.run_dir), self.state.progress.step
        everies = (training.validate_every, training.sample_every, self.config.checkpoint.every)
        if any(self.is_due(every) for every in everies):
            self.state.engine.gather_parameters()
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
            return self.state.engine.evaluate(batches, count)

    def sample(self, grid: SampleGrid, run_dir: Path) -> Path:
        """Draw the sample grid with the averaged weights; every rank computes, rank 0 writes."""
        with self.state.ema.applied():
            image = grid.draw(self.state.engine.denoise)
        path = run_dir / "samples" / f"step-{self.state.progress.step:08d}.png"
        if dist.get_rank() == 0:
            path.parent.mkdir(exist_ok=True)
            durable.write(path, png(image))
        return path
