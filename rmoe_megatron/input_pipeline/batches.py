"""Where a run's batches come from: shards, raw or precomputed, and the frozen encoders."""

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.utils.data import default_collate

from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.config.stages import Stage, stage_at
from rmoe_megatron.data.batch import Batch, Prompts, RawBatch, typed_batch
from rmoe_megatron.data.loader import BatchLayout, Samples, batches
from rmoe_megatron.data.mixture import Mixture
from rmoe_megatron.data.order import Order
from rmoe_megatron.distributed.launch import local_rank
from rmoe_megatron.distributed.process_groups import check_same_on_all_ranks
from rmoe_megatron.encoders.autoencoder import encode_images, load_autoencoder
from rmoe_megatron.encoders.conditions import NULL_TEXT, build_condition_encoder
from rmoe_megatron.input_pipeline.bad_samples import BadSamples, warn
from rmoe_megatron.input_pipeline.draws import (
    FIRST_VALIDATION_DRAW,
    StageDraws,
    check_continues,
    check_fingerprints,
    locate,
    open_draws,
)
from rmoe_megatron.input_pipeline.settings import check_shapes


def _open_in_turn(config: RunConfig) -> list[StageDraws]:
    """Open the data sets: rank 0 first, then one rank of every other machine, then all others.

    So indices and counts of buckets are made once, and copied to a machine once; and one rank asks who encoded the data.
    """
    mine = 0 if dist.get_rank() == 0 else 1 if local_rank() == 0 else 2
    opened = list[StageDraws]()
    for turn in range(3):
        if turn == mine:
            opened = open_draws(config)
            for draws in opened if mine == 0 else ():
                check_fingerprints(config, draws)
        dist.barrier()
    check_same_on_all_ranks(
        [line for draws in opened for line in draws.describe()],
        "let all of them see the same shards (copies of a disk of each machine may be old or not whole)",
    )
    return opened


class TrainingSource:
    """Batches of latents and conditions for this data-parallel rank, stage by stage.

    Raises:
        UserError: shards are missing or do not fit the model.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.waited = 0.0  # seconds in which training waited for the loader
        self.bad_samples = BadSamples(config.data, Path(config.run_dir), device)
        self.draws = _open_in_turn(config)
        self.autoencoder = load_autoencoder(config.encoders.autoencoder, device)
        first = self.draws[0].samples
        store = first.datasets[0].samples.store
        self.encoder = build_condition_encoder(
            config, device, store.sibling(NULL_TEXT) if first.datasets[0].has_text else None
        )
        self.null_conditions = self.encoder.null
        for draws in self.draws:
            for mixture in (draws.samples, draws.validation):
                if mixture is not None:
                    self._check_shapes(draws, mixture)

    def at(self, step: int) -> StageDraws:
        """Return what the step after ``step`` steps draws from."""
        return self.draws[stage_at([each.stage for each in self.draws], step).number]

    def training_batches(self, step: int, draw: int) -> Iterator[list[Batch]]:
        """Iterate over this rank's micro-batches of each training step of the stage that comes after ``step`` steps.

        Args:
            draw: draws of the run before that step.

        Raises:
            UserError: the steps before were of other stages or batches.
        """
        draws = self.at(step)
        check_continues(draws.stage, step, draw, len(self.draws), self.config.data.buckets is not None)
        loader = self._loader(draws.stage, draws.samples, draws, draw, None, self.config.data.num_workers)
        return self._in_steps(draws.stage, map(self._record_and_encode, self._time_waits(loader)))

    def batches_to_look_at(self) -> Iterator[Batch]:
        """Iterate over this rank's micro-batches of the first stage, from its first draw on.

        Samples that cannot be used are warned of; the run's list of them stays as it is.
        """
        draws = self.draws[0]
        return map(self._warn_and_encode, self._loader(draws.stage, draws.samples, draws, 0, None))

    def validation_batches(self, step: int) -> Iterator[tuple[str, list[Batch]]]:
        """Iterate over this rank's validation micro-batches, as many at once as a step takes: always the same in a stage.

        Yields:
            The bucket's size and its micro-batches.
        """
        draws = self.at(step)
        assert draws.validation is not None
        for bucket, order, first, last in draws.validation_parts(self.config.training.validation_samples):
            loader = self._loader(draws.stage, draws.validation, order, first, last)
            told = map(self._with_validation_noise, map(self._warn_and_encode, loader))
            for micro_batches in self._in_steps(draws.stage, told):
                yield str(draws.buckets[bucket]), micro_batches

    def has_validation(self, step: int) -> bool:
        """Whether validation shards are configured for the stage of the step after ``step`` steps."""
        return self.at(step).validation is not None

    def locate(self, draw: int) -> dict[str, str]:
        """Return the ``shard`` and ``key`` of a training draw's sample."""
        dataset, index = locate(self.draws, draw)
        return {"shard": dataset.samples.shard(index), "key": dataset.samples.name(index)}

    def encode_prompts(self, captions: list[str]) -> Prompts:
        """Encode captions or class labels for the sample grid."""
        return Prompts(captions, self.encoder.encode_prompts(captions), self.null_conditions)

    def _loader(
        self, stage: Stage, samples: Samples, order: Order, first: int, last: int | None, num_workers: int = 0
    ) -> Iterator[dict[str, Any]]:
        pin_memory = self.device.type == "cuda"
        return batches(samples, order, self._layout(stage), first, last, num_workers, pin_memory)

    def _in_steps(self, stage: Stage, micro_batches: Iterator[Batch]) -> Iterator[list[Batch]]:
        """Hand on as many micro-batches at once as a step takes."""
        while step := list(islice(micro_batches, self._layout(stage).micro_batches_per_step)):
            yield step

    def _warn_and_encode(self, collated: dict[str, Any]) -> Batch:
        warn(collated["bad_samples"])
        return self._embed(collated)

    def _time_waits(self, loader: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Hand on what is loaded, and add the time that it takes to come to ``waited``."""
        while True:
            asked = time.perf_counter()
            try:
                collated = next(loader)
            except StopIteration:
                return
            self.waited += time.perf_counter() - asked
            yield collated

    def _record_and_encode(self, collated: dict[str, Any]) -> Batch:
        self.bad_samples.note(collated)
        return self._embed(collated)

    @staticmethod
    def _layout(stage: Stage) -> BatchLayout:
        return BatchLayout(
            stage.global_batch_size,
            stage.micro_batch_size,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
        )

    def _embed(self, collated: dict[str, Any]) -> Batch:
        batch = typed_batch(collated)
        if isinstance(batch, RawBatch):
            latents = encode_images(self.autoencoder, batch.images)
            conditions = batch.conditions or self.encoder.encode_batch(batch)
            return Batch(latents, conditions, batch.draw_index)
        return batch

    @staticmethod
    def _with_validation_noise(batch: Batch) -> Batch:
        return replace(batch, draw_index=batch.draw_index + FIRST_VALIDATION_DRAW)

    def _check_shapes(self, draws: StageDraws, mixture: Mixture) -> None:
        """Check one sample of every data set."""
        for dataset in mixture.datasets:
            embedded = self._embed(default_collate([{**dataset.draw(0, 0), "draw_index": 0}]))
            tensors = {"latents": embedded.latents, **embedded.conditions.tensors()}
            shapes = {name: tuple(tensor.shape[1:]) for name, tensor in tensors.items()}
            size = draws.latent_sizes[dataset.samples.place(0)[0]]
            check_shapes(shapes, self.config.model, size, dataset.samples.folder, dataset.precomputed)
