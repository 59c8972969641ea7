"""The stages of a run: which steps take which resolution, batch and data. A run without ``training.stages`` is one stage."""

from dataclasses import dataclass

from rmoe_megatron.config.run import MixedDatasetConfig, RunConfig, StageConfig


@dataclass(frozen=True)
class Stage:
    """Steps of one resolution.

    Attributes:
        number: 0 is the first stage.
        first_step: steps of the run before it.
        end_step: steps of the run up to its end.
        first_draw: draws of the run before it.
        sample_size: side of the square latents.
        bucket_batch: draws in a row that are of one bucket.
        datasets: that it draws from.
        validation: folder of the validation samples, if there are some.
    """

    number: int
    first_step: int
    end_step: int
    first_draw: int
    sample_size: int
    micro_batch_size: int
    global_batch_size: int
    bucket_batch: int
    datasets: tuple[MixedDatasetConfig, ...]
    validation: str | None

    def draws(self, step: int) -> int:
        """Return the draws of the run before a step of this stage."""
        return self.first_draw + (step - self.first_step) * self.global_batch_size


def stages_of(config: RunConfig) -> list[Stage]:
    """Return the stages of a run, one after the other."""
    training, stages = config.training, list[Stage]()
    configured = training.stages or [StageConfig(training.steps, config.model.sample_size)]
    step = draw = 0
    for number, each in enumerate(configured):
        global_batch = each.global_batch_size or training.global_batch_size
        buckets = config.data.buckets
        stages.append(
            Stage(
                number,
                step,
                step + each.steps,
                draw,
                each.sample_size,
                each.micro_batch_size or training.micro_batch_size,
                global_batch,
                buckets.batch if buckets is not None and buckets.batch is not None else global_batch,
                _datasets(config, each),
                each.validation or config.data.validation,
            )
        )
        step, draw = step + each.steps, draw + each.steps * global_batch
    return stages


def stage_at(stages: list[Stage], step: int) -> Stage:
    """Return the stage that the step after ``step`` steps is of; after the last step it is the last stage."""
    return next((stage for stage in stages if step < stage.end_step), stages[-1])


def stage_of_draw(stages: list[Stage], draw: int) -> Stage:
    """Return the stage that a draw is of."""
    return [stage for stage in stages if stage.first_draw <= draw][-1]


def _datasets(config: RunConfig, stage: StageConfig) -> tuple[MixedDatasetConfig, ...]:
    folder = stage.train or config.data.train
    if folder is not None:
        return (MixedDatasetConfig(folder, weight=1.0),)
    return tuple(config.data.mixture)
