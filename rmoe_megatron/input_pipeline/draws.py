"""Which sample each draw of a run takes, in every stage: the data sets, their buckets, and their order."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from pydantic import TypeAdapter

from rmoe_megatron.config.buckets import Bucket
from rmoe_megatron.config.run import AugmentConfig, RunConfig
from rmoe_megatron.config.stages import Stage, stage_of_draw, stages_of
from rmoe_megatron.data.mixture import Mixture, shares
from rmoe_megatron.data.order import Order
from rmoe_megatron.data.training_dataset import TrainingDataset
from rmoe_megatron.encoders.fingerprint import DATASET, check_encoders
from rmoe_megatron.errors import UserError
from rmoe_megatron.files.untrusted import read_json
from rmoe_megatron.input_pipeline.settings import buckets_of, latent_sizes, sample_format
from rmoe_megatron.input_pipeline.shard_folders import store_of

# Validation draws get noise of their own: draw numbers that no training run reaches.
FIRST_VALIDATION_DRAW = 1 << 40
DESCRIPTION = TypeAdapter(dict[str, Any])


@dataclass(frozen=True)
class BucketSamples:
    """Samples of one bucket as an order: one after the other from draw ``start`` on, again and again."""

    first: int
    size: int
    start: int

    def __getitem__(self, draw: int) -> int:
        return self.first + (draw - self.start) % self.size


@dataclass(frozen=True)
class StageDraws:
    """What a stage draws from; as an order it takes the draws of the run.

    Attributes:
        buckets: sizes of pictures, in pixels.
        latent_sizes: height and width of the latents of each bucket.
        validation: None without validation samples.
    """

    stage: Stage
    buckets: tuple[Bucket, ...]
    latent_sizes: list[tuple[int, int]]
    samples: Mixture
    order: Order
    validation: Mixture | None

    def __getitem__(self, draw: int) -> int:
        return self.order[draw - self.stage.first_draw]

    def describe(self) -> list[str]:
        """Return what the data sets are, one line each."""
        return [
            f"{use} samples in {dataset.samples.index.describe()}"
            for use, mixture in (("training", self.samples), ("validation", self.validation))
            for dataset in (mixture.datasets if mixture is not None else ())
        ]

    def validation_parts(self, most: int) -> Iterator[tuple[int, Order, int, int]]:
        """Yield the buckets that have validation samples, their order, and between which draws they are.

        Every bucket has global batches of its own: as many of all as its share of the samples, and at least one.

        Args:
            most: validation samples of all buckets.
        """
        assert self.validation is not None
        batch, total = self.stage.global_batch_size, len(self.validation)
        first, draw = 0, 0
        for bucket in self.validation.buckets:
            size = self.validation.size(bucket)
            if size:
                batches = max(min(most, total) * size // (batch * total), 1)
                yield bucket, BucketSamples(first, size, draw), draw, draw + batches * batch
                draw += batches * batch
            first += size


def open_draws(config: RunConfig, with_validation: bool = True) -> list[StageDraws]:
    """Open the data sets of every stage.

    Raises:
        UserError: shards are missing, have no samples of the buckets, or are no mixture.
    """
    return [_open(config, stage, with_validation) for stage in stages_of(config)]


def _open(config: RunConfig, stage: Stage, with_validation: bool) -> StageDraws:
    taken = sample_format(config, stage.sample_size)
    datasets = [TrainingDataset(store_of(config, each.path), taken) for each in stage.datasets]
    samples = Mixture(datasets, shares(stage.datasets, datasets))
    validation = None
    if with_validation and stage.validation is not None:
        held_out = TrainingDataset(
            store_of(config, stage.validation), replace(taken, filter=None, augment=AugmentConfig())
        )
        validation = Mixture([held_out], [Fraction(1)])
    order = samples.order(config.data.shuffle, config.seed, stage.number, stage.bucket_batch)
    sizes = latent_sizes(config, stage.sample_size)
    return StageDraws(stage, buckets_of(config, stage.sample_size), sizes, samples, order, validation)


def locate(draws: list[StageDraws], draw: int) -> tuple[TrainingDataset, int]:
    """Return the data set of a training draw's sample and its number there."""
    stage = stage_of_draw([each.stage for each in draws], draw)
    return draws[stage.number].samples.place(draws[stage.number][draw])


def check_fingerprints(config: RunConfig, draws: StageDraws) -> None:
    """Check that what a stage draws from was precomputed with the encoders of the configuration, where it says with which.

    Raises:
        UserError: it was not.
    """
    for mixture in (draws.samples, draws.validation):
        for dataset in mixture.datasets if mixture is not None else ():
            path = dataset.samples.store.sibling(DATASET) if dataset.precomputed or dataset.has_text else None
            if path is not None:
                described = read_json(path, DESCRIPTION)
                check_encoders(described, config, dataset.samples.folder, dataset.precomputed)


def check_continues(stage: Stage, step: int, draw: int, stages: int, has_buckets: bool) -> None:
    """Check that a run whose ``step`` steps took ``draw`` draws can go on in a stage.

    Raises:
        UserError: its stages or its batches of one bucket were others.
    """
    if stages > 1 and draw != stage.draws(step):
        raise UserError(
            f"The checkpoint of step {step} has drawn {draw} samples, but with training.stages as they are now it would be "
            f"{stage.draws(step)}; resume with the stages that it was trained with."
        )
    if has_buckets and (draw - stage.first_draw) % stage.bucket_batch:
        raise UserError(
            f"The checkpoint of step {step} has drawn {draw} samples, which are no whole batches of "
            f"{stage.bucket_batch} draws of one bucket; resume with the data.buckets.batch that it was trained with."
        )
