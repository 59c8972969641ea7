"""What happens in which step of a run: training, validation, saving, sampling, logging; and where it can stop."""

import functools
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from rmoe_megatron.checkpoint.folders import write_pending
from rmoe_megatron.checkpoint.run_checkpoint import save_checkpoint
from rmoe_megatron.checkpoint.saving import NotSavedError
from rmoe_megatron.config.run import EvaluationConfig, RunConfig
from rmoe_megatron.data.batch import Batch
from rmoe_megatron.distributed.device import peak_memory, runs_on_cuda
from rmoe_megatron.engine.protocol import StepResult
from rmoe_megatron.engine.registry import engine_of
from rmoe_megatron.files import atomic
from rmoe_megatron.files.disk_errors import warned
from rmoe_megatron.files.images import png
from rmoe_megatron.input_pipeline.batches import TrainingSource
from rmoe_megatron.model.precision.backend import (
    describe_backend,
    describe_kernels,
    warn_of_new_histories,
    warn_of_slow_precision,
)
from rmoe_megatron.training.benchmarks import open_benchmark
from rmoe_megatron.training.evaluations import Evaluation
from rmoe_megatron.training.gate_alarms import GateAlarms
from rmoe_megatron.training.health import Health
from rmoe_megatron.training.interruption import Interruption, StopRequest
from rmoe_megatron.training.logging import RunLogger, describe_run
from rmoe_megatron.training.sample_grid import SampleGrid
from rmoe_megatron.training.state import TrainingState
from rmoe_megatron.training.throughput import Throughput

logger = logging.getLogger(__name__)

# Shares of the way to noise at which the validation loss is taken too: those of MLPerf's FLUX.1 benchmark.
FIXED_TIMES = [number / 8 for number in range(8)]


@dataclass
class TrainingLoop:
    """Steps, validates, saves, draws; until the configured number of steps is done or the run is asked to stop.

    Attributes:
        restarts: how often the run was started again; rank 0 knows it.
        may_publish: raises if another process has taken over the run; rank 0 asks it before a checkpoint is published.
        averages_due: the update whose parameters the averages have not seen yet.
        saved: step of the last checkpoint, and what is to follow it and is not done yet.
        waited: seconds for data, up to the last step.
    """

    config: RunConfig
    state: TrainingState
    source: TrainingSource
    device: torch.device
    restarts: int = 0
    may_publish: Callable[[], None] = lambda: None
    interruption: Interruption = field(default_factory=Interruption)
    averages_due: int | None = None
    saved: tuple[int, list[str]] = (0, [])
    waited: float = 0.0
    gate_alarms: GateAlarms | None = None

    def run(self) -> str | None:
        """Train from ``state.progress`` to the last step; returns None, or why it stopped before and saved."""
        training, progress, engine = self.config.training, self.state.progress, self.state.engine
        run_dir = Path(self.config.run_dir)
        self.log = RunLogger(
            run_dir,
            self.config.logging,
            training.steps,
            progress.step,
            is_rank0=dist.get_rank() == 0,
            description=describe_run(self.config),
        )
        engine_kind = engine_of(self.config)
        self.log.announce(describe_backend(self.config, engine_kind.libraries))
        if dist.get_rank() == 0:
            adam = engine_kind.describe_adam(self.config, runs_on_cuda(self.config.device))
            logger.info(describe_kernels(self.config, adam))
        for warning in (
            warn_of_slow_precision(self.config),
            warn_of_new_histories(self.config, progress.step),
        ):
            if warning is not None:
                self.log.announce(f"warning: {warning}")
        self.grid = None
        if training.sample_prompts:
            prompts = self.source.encode_prompts(training.sample_prompts)
            self.grid = SampleGrid(self.config, prompts, self.source.autoencoder)
        self.evaluations = {f"evaluation {each.name}": self.prepare(each) for each in training.evaluations}
        if self.config.recurrence is not None:
            self.gate_alarms = GateAlarms(self.config.recurrence.num_modules)
        health = Health(run_dir, engine, self.source.locate, training.max_skipped_steps)
        self.throughput = Throughput(self.config, self.device)
        self.forget_what_is_not_configured()
        if progress.step >= training.steps and not progress.pending:
            self.log.announce(finished(self.config))
        self.saved = progress.step, list(progress.pending)
        why, draws, batches = None, None, iter(list[list[Batch]]())
        try:
            self.run_pending()  # what the step before an interruption left
            while progress.step < training.steps:
                self.interruption.check()
                if self.source.at(progress.step) is not draws:
                    draws = self.source.at(progress.step)
                    batches = self.source.training_batches(progress.step, progress.samples)
                health.check(progress.step + 1, self.step(next(batches)))
                self.run_pending()
        except StopRequest as request:
            why = str(request)
            self.save_for_later()
        self.log.close()
        return why

    def step(self, micro_batches: list[Batch]) -> StepResult:
        """Take one optimizer step, log it, and put down what is to follow it."""
        training, progress, engine = self.config.training, self.state.progress, self.state.engine
        is_logged = self.is_due(training.log_every, progress.step + 1)
        result = engine.step(micro_batches, before_update=self.update_averages, watches_gates=is_logged)
        if result.suspects is None:
            self.averages_due = progress.step
        progress.step += 1
        progress.validation_loss = None
        progress.samples += (
            sum(len(batch.latents) for batch in micro_batches) * parallel_state.get_data_parallel_world_size()
        )
        progress.skipped_steps += result.suspects is not None
        self.throughput.count(micro_batches, self.source.waited - self.waited)
        self.waited = self.source.waited
        if not is_logged:
            self.log.show_step(progress.step, result.loss, self.remaining())
        else:
            metrics = (
                self.metrics(result)
                | engine.routing_metrics()
                | self.throughput.rates()
                | self.source.bad_samples.check()
            )
            self.log.log_metrics(progress.step, metrics, self.remaining())
            if self.gate_alarms is not None and (alarm := self.gate_alarms.line(metrics)) is not None:
                self.log.announce(f"step {progress.step}: {alarm}")
        progress.pending = [kind for kind, every in self.pauses().items() if self.is_due(every)]
        return result

    def remaining(self) -> float | None:
        """Return the seconds to the end of the run, if they are known."""
        return self.throughput.remaining(self.config.training.steps - self.state.progress.step)

    def pauses(self) -> dict[str, int]:
        """Return what happens between steps, every how many of them, in this order."""
        training = self.config.training
        has_validation = self.source.has_validation(self.state.progress.step - 1)
        pauses = {"validation": training.validate_every} if has_validation else {}
        pauses["checkpoint"] = self.config.checkpoint.every
        pauses |= {"samples": training.sample_every} if self.grid is not None else {}
        return pauses | {f"evaluation {each.name}": each.every for each in training.evaluations}

    def forget_what_is_not_configured(self) -> None:
        """Leave out, and say so, what the checkpoint left to be done if the configuration no longer has it."""
        progress = self.state.progress
        for kind in list(progress.pending):
            if kind not in self.pauses():
                progress.pending.remove(kind)
                self.log.announce(
                    f"step {progress.step}: the checkpoint says that {kind} should follow, which the configuration no longer "
                    f"has; the run goes on without."
                )

    def run_pending(self) -> None:
        """Do what is pending after a step: validate, save, sample; what fails in sampling has been saved before.

        Raises:
            StopRequest: the run is asked to stop; what was not finished stays pending.
        """
        pending = self.state.progress.pending
        if pending:
            self.state.engine.gather_parameters()
            self.update_averages()
        actions = {"validation": self.validate, "checkpoint": self.save, "samples": self.sample}
        actions |= {kind: functools.partial(self.score, kind) for kind in self.evaluations}
        while pending:
            kind = pending[0]
            with self.throughput.paused(kind, self.pauses()[kind]):
                actions[kind]()
            if kind in pending:
                pending.remove(kind)
            self.record_as_done(kind)

    def record_as_done(self, kind: str) -> None:
        """Put down that what was to follow the last checkpoint was done, so that a resumed run does not do it again."""
        step, left = self.saved
        if step != self.state.progress.step or kind not in left:
            return
        left.remove(kind)
        if dist.get_rank() == 0:
            with warned(f"A run that is resumed from step {step} does {kind} again"):
                write_pending(Path(self.config.run_dir), step, left)

    def is_due(self, every: int, step: int | None = None) -> bool:
        """Whether what happens every so many steps and after the last does so after a step, or after the last that was taken."""
        step = self.state.progress.step if step is None else step
        return step % every == 0 or step == self.config.training.steps

    def metrics(self, result: StepResult) -> dict[str, float]:
        """Return what is logged of a step."""
        memory = peak_memory(self.device)
        return {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "samples": self.state.progress.samples,
            "skipped_steps": self.state.progress.skipped_steps,
            "restarts": self.restarts,
        } | ({"gpu_memory_gigabytes": memory / 1e9} if memory is not None else {})

    def update_averages(self) -> None:
        """Let the averages see the weights of the last update, once its parameters are here."""
        if self.averages_due is not None:
            self.state.ema.update(self.averages_due)
            self.averages_due = None

    def save(self) -> None:
        """Publish a checkpoint; what else is pending is done after it, also if that is in another process.

        Raises:
            NotSavedError: the system refuses to write, and this is the last chance to.
        """
        progress, started = self.state.progress, time.monotonic()
        is_periodic = "checkpoint" in progress.pending and progress.step < self.config.training.steps
        if "checkpoint" in progress.pending:
            progress.pending.remove("checkpoint")
        try:
            save_checkpoint(self.state, self.config, Path(self.config.run_dir), self.may_publish)
        except NotSavedError as error:
            if not is_periodic:
                raise
            if dist.get_rank() == 0:
                logger.warning("%s The run goes on and tries again at its next checkpoint.", error)
            return
        self.saved = progress.step, list(progress.pending)
        self.log.draw_curves()
        self.interruption.save_seconds = time.monotonic() - started

    def save_for_later(self) -> None:
        """Save where the run was asked to stop, unless the last checkpoint says it all."""
        self.state.engine.gather_parameters()
        self.update_averages()
        pending = [kind for kind in self.state.progress.pending if kind != "checkpoint"]
        if (self.state.progress.step, pending) != self.saved:
            self.save()

    def validate(self) -> None:
        """Log the loss of the averaged weights on the validation samples, with noise that is the same each time.

        ``validation_loss`` is at drawn timesteps, as in training; ``fixed_timestep_loss`` is the mean at eight that don't change.
        """
        step, losses = self.state.progress.step, dict[str, list[float]]()
        at_times = dict[float, list[float]]()
        with self.state.ema.applied():
            for bucket, micro_batches in self.source.validation_batches(step - 1):
                self.interruption.check()
                losses.setdefault(bucket, []).append(self.state.engine.evaluate(micro_batches))
                for share in FIXED_TIMES:
                    self.interruption.check()
                    loss = self.state.engine.evaluate([batch.at(share) for batch in micro_batches])
                    at_times.setdefault(share, []).append(loss)
        metrics = {"validation_loss": fmean(chain(*losses.values()))}
        metrics["fixed_timestep_loss"] = fmean(chain(*at_times.values()))
        metrics |= {f"fixed_timestep_loss_{share:.3f}": fmean(found) for share, found in at_times.items()}
        if self.config.data.buckets is not None:
            metrics |= {f"validation_loss_{bucket}": fmean(found) for bucket, found in losses.items()}
        if math.isfinite(metrics["validation_loss"]):
            self.state.progress.validation_loss = metrics["validation_loss"]
        self.log.log_metrics(step, metrics)

    def prepare(self, settings: EvaluationConfig) -> Evaluation:
        """Make an evaluation with its encoded prompts and its judge; every rank does."""
        benchmark = open_benchmark(settings)
        prompts = self.source.encode_prompts(benchmark.captions)
        return Evaluation(self.config, benchmark, prompts, self.source.autoencoder)

    def score(self, kind: str) -> None:
        """Score the averaged weights by a benchmark; every rank takes part, rank 0 logs and writes."""

        def denoise(*inputs: Any) -> torch.Tensor:
            self.interruption.check()
            return self.state.engine.denoise(*inputs)

        step = self.state.progress.step
        ((height, width),) = self.source.at(step - 1).latent_sizes
        with self.state.ema.applied():
            evaluated = self.evaluations[kind].run(denoise, height, width, self.interruption.check)
        if evaluated is None:
            return
        self.log.log_metrics(step, evaluated.metrics)
        name = kind.removeprefix("evaluation ")
        path = Path(self.config.run_dir) / "evaluations" / name / f"step-{step:08d}.png"
        with warned(f"The examples of the evaluation of step {step}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write(path, png(evaluated.picture))
            self.log.log_image(f"evaluation_{name}", path, step)

    def sample(self) -> None:
        """Draw a sample grid of every bucket with the averaged weights; every rank computes, rank 0 writes."""
        assert self.grid is not None

        def denoise(*inputs: Any) -> torch.Tensor:
            self.interruption.check()
            return self.state.engine.denoise(*inputs)

        step = self.state.progress.step
        draws, has_buckets = self.source.at(step - 1), self.config.data.buckets is not None
        with self.state.ema.applied():
            images = [self.grid.draw(denoise, *size) for size in draws.latent_sizes]
        for bucket, image in zip(draws.buckets, images, strict=True):
            name = f"-{bucket}" if has_buckets else ""
            path = Path(self.config.run_dir) / "samples" / f"step-{step:08d}{name}.png"
            if dist.get_rank() == 0:
                with warned(f"The samples of step {step}"):
                    path.parent.mkdir(exist_ok=True)
                    atomic.write(path, png(image))
                    self.log.log_image(f"samples{name}", path, step)


def finished(config: RunConfig) -> str:
    """Return a sentence that a run has nothing left to do, and how to train on."""
    steps = config.training.steps
    return (
        f"{config.run_dir} is finished: all of its {steps} steps are done; `rmoe train --resume {config.run_dir} "
        f"training.steps={2 * steps}` trains on."
    )
