"""What a model takes of a shard folder: raw samples or precomputed ones, as tensors and captions."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rmoe_megatron.config.captions import CaptionSource
from rmoe_megatron.config.run import AugmentConfig
from rmoe_megatron.config.sample_filter import SampleFilter
from rmoe_megatron.counter_rng import Purpose, derive, normal, sample_keys, uniform
from rmoe_megatron.data.captions import captions_of
from rmoe_megatron.data.shards.bucketing import Bucketing
from rmoe_megatron.data.shards.dataset import ShardDataset
from rmoe_megatron.data.shards.decoding import BFLOAT16, MIDDLE, View
from rmoe_megatron.data.shards.index import (
    IMAGES,
    LATENTS,
    LOG_VARIANCE,
    TEXT_HIDDEN_STATES,
    TEXT_POOLED,
    provided,
)
from rmoe_megatron.data.storage.store import ShardStore
from rmoe_megatron.errors import UserError

PRECOMPUTED_TEXT = {"text_hidden_states": TEXT_HIDDEN_STATES, "text_pooled": TEXT_POOLED}
CLASS_LABEL = "cls"


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used, why, and the draw that asked for it or for one before it."""

    shard: str
    key: str
    reason: str
    draw: int


@dataclass(frozen=True)
class SampleFormat:
    """What a model takes of samples.

    Attributes:
        num_classes: how many classes a class-conditional model has, 0 for text.
        bucketing: the sizes that raw images are cut to; None leaves them as they are.
        divides: number the samples by bucket, and leave out those of none; otherwise there is one bucket, whatever their size.
        pixels_per_latent: pixels of a side for each latent, for precomputed samples.
        captions: where they are in raw samples.
        seed: the run's seed, which the choice among several captions depends on.
        filter: which raw samples to take; None takes all.
        augment: how raw pictures change from draw to draw.
    """

    num_classes: int = 0
    bucketing: Bucketing | None = None
    divides: bool = False
    pixels_per_latent: int = 1
    captions: tuple[CaptionSource, ...] = (CaptionSource("txt"),)
    seed: int = 0
    filter: SampleFilter | None = None
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def takes(self, members: set[str]) -> bool:
        """Whether a raw sample of these members has an image, and a class or a caption."""
        if members.isdisjoint(IMAGES):
            return False
        if self.num_classes:
            return CLASS_LABEL in members
        return any(source.member in members for source in self.captions)

    @property
    def needed(self) -> str:
        """Return in words which members a raw sample has to have."""
        conditions = [CLASS_LABEL] if self.num_classes else [source.member for source in self.captions]
        return f"{' or '.join(dict.fromkeys(conditions))}, {' or '.join(IMAGES)}"

    def view(self, draw: int) -> View:
        """Return which part of a raw sample's picture a draw sees, and whether it is mirrored."""
        if not (self.augment.flips or self.augment.crops):
            return MIDDLE
        key = derive(sample_keys(self.seed, torch.tensor([draw])), Purpose.augmentation)
        place, side = uniform(key, 2)[0].tolist()
        crops, flipped = self.augment.crops, self.augment.flips and side < 0.5
        return View(place if crops else 0.5, flipped, drawn=crops)

    def caption(self, sample: dict[str, Any], draw: int) -> str:
        """Return one of a raw sample's captions, by their weights; another draw may give another.

        Those of a list share the weight of their source.

        Raises:
            ValueError: it has none.
        """
        found = [
            (text, source.weight / len(texts))
            for source in self.captions
            for texts in (_captions(sample, source),)
            for text in texts
        ]
        if not found:
            raise ValueError("its JSON has no caption")
        if len(found) == 1:
            return found[0][0]
        key = derive(sample_keys(self.seed, torch.tensor([draw])), Purpose.caption)
        place = uniform(key, 1).item() * sum(weight for _, weight in found)
        for text, weight in found:
            place -= weight
            if place < 0:
                return text
        return found[-1][0]


def _captions(sample: dict[str, Any], source: CaptionSource) -> list[str]:
    value = sample.get(source.member)
    if source.key is None:
        return [value] if isinstance(value, str) else []
    value = value.get(source.key) if isinstance(value, dict) else None
    return [value] if isinstance(value, str) else captions_of(value)


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Return a stored array as a tensor: 16 bits as they are, which is half as much to hand from process to process."""
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.astype(np.float16 if array.dtype == np.float16 else np.float32))


def image_of(sample: dict[str, Any]) -> np.ndarray:
    """Return the image of a decoded raw sample, uint8 [3, H, W]."""
    return next(sample[extension] for extension in IMAGES if extension in sample)


class TrainingDataset:
    """Training samples of a shard folder, raw or precomputed; which one is read off the first sample.

    Raw samples are ``{"image": uint8 [3, H, W], "caption": str}``; precomputed ones float16 or bfloat16 tensors (float32 if
    stored otherwise) ``latents`` [C, H, W], ``text_hidden_states`` [L, D] and ``text_pooled`` [P]. Latents that are stored as a
    distribution are drawn from it in float32, by seed and draw: anew in every epoch, alike in every layout. Raw samples whose text is
    precomputed have these two in the caption's place; for a class-conditional model ``class_labels``, an int, is there.

    Attributes:
        precomputed: samples have latents.
        has_distributions: these are drawn from mean and log-variance.
        has_text: captions are embedded, too.

    Args:
        sample_format: what the model takes.
        shards: names of the shards of ``folder`` to use; None takes all.
    """

    def __init__(
        self, folder: Path | ShardStore, sample_format: SampleFormat, shards: list[str] | None = None
    ) -> None:
        self.samples = ShardDataset(folder, shards=shards, sample_filter=sample_format.filter)
        self.format = sample_format
        members = provided(set(self.samples.members(0)))
        self.precomputed = LATENTS in members
        kinds = self.samples.index.kinds
        self.has_distributions = self.precomputed and any(LOG_VARIANCE in kind.members for kind in kinds)
        self.has_text = not sample_format.num_classes and {TEXT_HIDDEN_STATES, TEXT_POOLED} <= members
        if self.precomputed and sample_format.filter is not None:
            raise UserError(
                f"{folder} holds precomputed samples, which data.filter does not know the pictures of; set it for "
                "`rmoe data precompute`, and null for training."
            )
        if self.precomputed and (sample_format.augment.flips or sample_format.augment.crops):
            raise UserError(
                f"{folder} holds precomputed samples, whose pictures data.augment cannot change any more; leave it out (data.precompute.crops "
                "and data.precompute.flips make samples of parts and mirrored pictures)."
            )
        if self.precomputed:
            text = list(PRECOMPUTED_TEXT.values())
            needed = [
                LATENTS,
                *([LOG_VARIANCE] if self.has_distributions else []),
                *([CLASS_LABEL] if sample_format.num_classes else text),
            ]
            self.samples.restrict(needed, self._divided_by(sample_format.pixels_per_latent))
        else:
            self.samples.bucketing = sample_format.bucketing
            self.samples.keep(self._takes, self._needed, self._divided_by(None))
            self.samples.wanted = {
                *IMAGES,
                CLASS_LABEL,
                *(source.member for source in sample_format.captions),
                *(PRECOMPUTED_TEXT.values() if self.has_text else ()),
            }
        self.samples.require_shapes_of_first()  # samples of a batch are stacked; those of a bucket have its size

    @property
    def kind(self) -> str:
        """Return what the samples are, in words; those of a batch are of one kind."""
        if self.precomputed:
            return "precomputed as distributions" if self.has_distributions else "precomputed"
        return "raw, with embedded text," if self.has_text else "raw"

    def _takes(self, members: set[str]) -> bool:
        if not self.has_text:
            return self.format.takes(members)
        return not members.isdisjoint(IMAGES) and set(PRECOMPUTED_TEXT.values()) <= provided(members)

    @property
    def _needed(self) -> str:
        text = ", ".join(PRECOMPUTED_TEXT.values())
        return f"{text}, {' or '.join(IMAGES)}" if self.has_text else self.format.needed

    def __len__(self) -> int:
        return len(self.samples)

    def expect(self, indices: list[int]) -> None:
        """Begin to read samples that will be asked for next."""
        self.samples.expect(indices)

    def _divided_by(self, pixels_per_latent: int | None) -> Bucketing | None:
        bucketing = self.format.bucketing
        if bucketing is None or not self.format.divides:
            return None
        return replace(bucketing, pixels_per_latent=pixels_per_latent)

    @property
    def sizes(self) -> list[int]:
        """Return the number of samples of each bucket."""
        return [len(selection) for selection in self.samples.selections]

    def draw(self, index: int, draw: int, bad: list[BadSample] | None = None) -> dict[str, Any]:
        """Return the sample at ``index`` as the ``draw``-th draw of a run sees it.

        Args:
            bad: takes up what cannot be used; without it a warning is logged.

        Raises:
            UserError: no sample can be read, or its class is none of the model's.
        """

        def note(number: int, error: Exception) -> None:
            assert bad is not None
            shard, key = self.samples.shard(number), self.samples.name(number)
            bad.append(BadSample(shard, key, str(error), draw))

        return self.samples.read(
            index,
            lambda sample: self._image(sample, draw) | self._conditions(sample, draw),
            note if bad is not None else None,
            self.format.view(draw),
        )

    def _image(self, sample: dict[str, Any], draw: int) -> dict[str, Any]:
        if self.has_distributions:
            mean, log_variance = _tensor(sample[LATENTS]).float(), _tensor(sample[LOG_VARIANCE]).float()
            if mean.shape != log_variance.shape:
                raise ValueError(
                    f"{LOG_VARIANCE} has shape {tuple(log_variance.shape)}, {LATENTS} {tuple(mean.shape)}"
                )
            key = derive(sample_keys(self.format.seed, torch.tensor(draw)), Purpose.latents)
            noise = normal(key, mean.numel()).reshape(mean.shape)
            return {"latents": mean + torch.exp(log_variance / 2) * noise}
        if self.precomputed:
            return {"latents": _tensor(sample[LATENTS])}
        return {"image": torch.from_numpy(image_of(sample))}

    def _conditions(self, sample: dict[str, Any], draw: int) -> dict[str, Any]:
        if self.format.num_classes:
            return self._label(sample)
        if not self.has_text:
            return {"caption": self.format.caption(sample, draw)}
        return {name: _tensor(sample[member]) for name, member in PRECOMPUTED_TEXT.items()}

    def _label(self, sample: dict[str, Any]) -> dict[str, Any]:
        label, classes = sample[CLASS_LABEL], self.format.num_classes
        if not 0 <= label < classes:
            raise UserError(
                f"Sample {sample['__key__']} of {self.samples.folder} has class {label}, but model.num_classes is "
                f"{classes}."
            )
        return {"class_labels": label}
