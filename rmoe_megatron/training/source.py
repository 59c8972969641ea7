"""Where a run's batches come from: shards, raw or precomputed, and the frozen encoders."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.utils.data import default_collate

from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.data.batch import Batch, Prompts, RawBatch, typed_batch
from rmoe_megatron.data.indexing import open_index
from rmoe_megatron.data.loader import BatchLayout, batches
from rmoe_megatron.data.order import GlobalOrder
from rmoe_megatron.data.samples import SampleFormat, TrainingDataset
from rmoe_megatron.encoders.autoencoder import encode_images, load_autoencoder
from rmoe_megatron.encoders.conditions import build_condition_encoder
from rmoe_megatron.training.bad_samples import BadSamples, warn
from rmoe_megatron.training.preflight import check_shapes, sample_format

# Validation draws get noise of their own: draw numbers that no training run reaches.
FIRST_VALIDATION_DRAW = 1 << 40


def _index_once(formats: dict[Path, SampleFormat]) -> None:
    """Have rank 0 bring the indices of shard folders up to date before the other ranks open them."""
    if dist.get_rank() == 0:
        for folder, taken in formats.items():
            open_index(folder, taken.filter)
    dist.barrier()


class TrainingSource:
    """Batches of latents and conditions for this data-parallel rank.

    Raises:
        UserError: shards are missing or do not fit the model.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.waited = 0.0  # seconds in which training waited for the loader
        self.bad_samples = BadSamples(config.data, Path(config.run_dir), device)
        taken, validation = sample_format(config), config.data.validation
        unfiltered = replace(taken, filter=None)
        _index_once({Path(config.data.train): taken} | ({Path(validation): unfiltered} if validation else {}))
        self.train = TrainingDataset(Path(config.data.train), taken)
        self._order = GlobalOrder(len(self.train), config.data.shuffle, config.seed)
        self.validation = TrainingDataset(Path(validation), unfiltered) if validation else None
        self.autoencoder = load_autoencoder(config.encoders.autoencoder, device)
        self.encoder = build_condition_encoder(
            config, device, precomputed=Path(config.data.train) if self.train.precomputed else None
        )
        self.null_conditions = self.encoder.null
        for dataset in (self.train, self.validation):
            if dataset is not None:
                self._check_shapes(dataset)

    @property
    def has_validation(self) -> bool:
        """Whether validation shards are configured."""
        return self.validation is not None

    def training_batches(self, first_draw: int) -> Iterator[Batch]:
        """Iterate over this rank's training micro-batches from ``first_draw`` on, without end."""
        order = GlobalOrder(len(self.train), self.config.data.shuffle, self.config.seed)
        loader = batches(
            self.train, order, self._layout(), first_draw, num_workers=self.config.data.num_workers
        )
        return map(self._noted, self._timed(loader))

    def _told(self, collated: dict[str, Any]) -> Batch:
        warn(collated["bad_samples"])
        return self._embed(collated)

    def _timed(self, loader: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Hand on what is loaded, and add the time that it takes to come to ``waited``."""
        while True:
            asked = time.perf_counter()
            try:
                collated = next(loader)
            except StopIteration:
                return
            self.waited += time.perf_counter() - asked
            yield collated

    def _noted(self, collated: dict[str, Any]) -> Batch:
        self.bad_samples.note(collated)
        return self._embed(collated)

    def locate(self, draw: int) -> dict[str, str]:
        """Return the ``shard`` and ``key`` of a training draw's sample."""
        index, samples = self._order[draw], self.train.samples
        return {"shard": str(samples.shard(index)), "key": samples.name(index)}

    def validation_batches(self) -> tuple[Iterator[Batch], int]:
        """Return the validation micro-batches of this rank and their number; they are the same every time."""
        assert self.validation is not None
        layout = self._layout()
        samples = min(self.config.training.validation_samples, len(self.validation))
        steps = max(samples // layout.global_batch_size, 1)
        order = GlobalOrder(len(self.validation), shuffle=False, seed=0)
        loader = batches(self.validation, order, layout, last_draw=steps * layout.global_batch_size)
        micro_batches = (
            steps * layout.global_batch_size // (layout.micro_batch_size * layout.data_parallel_size)
        )
        return map(self._with_validation_noise, map(self._told, loader)), micro_batches

    def encode_prompts(self, captions: list[str]) -> Prompts:
        """Encode captions or class labels for the sample grid."""
        return Prompts(captions, self.encoder.encode_prompts(captions), self.null_conditions)

    def _layout(self) -> BatchLayout:
        training = self.config.training
        return BatchLayout(
            training.global_batch_size,
            training.micro_batch_size,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
        )

    def _embed(self, collated: dict[str, Any]) -> Batch:
        batch = typed_batch(collated)
        if isinstance(batch, RawBatch):
            latents = encode_images(self.autoencoder, batch.images)
            return Batch(latents, self.encoder.encode_batch(batch), batch.sample_index)
        return batch

    @staticmethod
    def _with_validation_noise(batch: Batch) -> Batch:
        return replace(batch, sample_index=batch.sample_index + FIRST_VALIDATION_DRAW)

    def _check_shapes(self, dataset: TrainingDataset) -> None:
        embedded = self._embed(default_collate([{**dataset.draw(0, 0), "sample_index": 0}]))
        tensors = {"latents": embedded.latents, **embedded.conditions.tensors()}
        shapes = {name: tuple(tensor.shape[1:]) for name, tensor in tensors.items()}
        check_shapes(shapes, self.config.model, dataset.samples.folder, dataset.precomputed)
