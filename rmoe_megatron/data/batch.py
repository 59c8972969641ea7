"""What a batch is: the values that go from shards and encoders through the objective into the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditions:
    """What to draw: tensors with the batch first, under the names of the model's arguments."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by the names of the model's arguments."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply a function to every tensor."""
        return type(self)(*(function(tensor) for tensor in self.tensors().values()))

    def combine(self, other: Self, function: Callable[[Tensor, Tensor], Tensor]) -> Self:
        """Apply a function to every tensor and its counterpart in ``other``."""
        pairs = zip(self.tensors().values(), other.tensors().values(), strict=True)
        return type(self)(*(function(mine, theirs) for mine, theirs in pairs))

    @property
    def device(self) -> torch.device:
        """Return where the tensors are."""
        return next(iter(self.tensors().values())).device


@dataclass(frozen=True)
class TextConditions(Conditions):
    """Embedded captions."""

    text_hidden_states: Tensor  # float32 [B, L, text_hidden_size]
    text_pooled: Tensor  # float32 [B, pooled_size]


@dataclass(frozen=True)
class ClassConditions(Conditions):
    """Classes; the number after the last one stands for the dropped label."""

    class_labels: Tensor  # int64 [B]


@dataclass(frozen=True)
class Prompts:
    """What to draw: captions or class labels, their conditions [N, ...] and those of nothing [1, ...]."""

    captions: list[str]
    conditions: Conditions
    null_conditions: Conditions


@dataclass(frozen=True)
class Batch:
    """Samples as the objective takes them; floating-point tensors have the type they were stored in until :meth:`to`."""

    latents: Tensor  # float32 [B, C, height, width]
    conditions: Conditions
    draw_index: Tensor  # int64 [B], the number of the draw, which all random numbers of the sample depend on
    time: Tensor | None = None  # float32 [B] in [0, 1), the share of the way to noise; None draws it

    def at(self, time: float) -> Batch:
        """Return the batch to be noised to a time that is not drawn."""
        times = torch.full((len(self.latents),), time, device=self.latents.device)
        return replace(self, time=times)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device`` in float32; of pinned memory the host does not wait for the copy."""

        def move(tensor: Tensor) -> Tensor:
            moved = tensor.to(device, non_blocking=True)
            return moved.float() if moved.is_floating_point() else moved

        time = None if self.time is None else move(self.time)
        return Batch(move(self.latents), self.conditions.map(move), move(self.draw_index), time)

    def not_finite(self) -> dict[str, Tensor]:
        """Return for every floating-point input which samples have values that are not finite, bool [B]."""
        inputs = {"latents": self.latents, **self.conditions.tensors()}
        return {
            name: ~tensor.isfinite().flatten(1).all(dim=1)
            for name, tensor in inputs.items()
            if tensor.is_floating_point()
        }


@dataclass(frozen=True)
class RawBatch:
    """Samples that the autoencoder has yet to see; one of captions, labels and conditions is there."""

    images: Tensor  # uint8 [B, 3, H, W]
    captions: list[str] | None
    class_labels: Tensor | None  # int64 [B]
    conditions: TextConditions | None
    draw_index: Tensor  # int64 [B]


def typed_batch(collated: dict[str, Any]) -> Batch | RawBatch:
    """Return a batch of what the loader yields for samples of a :class:`rmoe_megatron.data.training_dataset.TrainingDataset`."""
    draws, labels = collated["draw_index"], collated.get("class_labels")
    text = None
    if "text_pooled" in collated:
        text = TextConditions(collated["text_hidden_states"], collated["text_pooled"])
    if "latents" not in collated:
        return RawBatch(collated["image"], collated.get("caption"), labels, text, draws)
    if labels is not None:
        return Batch(collated["latents"], ClassConditions(labels), draws)
    assert text is not None
    return Batch(collated["latents"], text, draws)
