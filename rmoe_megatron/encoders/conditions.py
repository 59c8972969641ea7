"""What a model is conditioned on, made from raw samples and from prompts: embedded captions, or class labels."""

from pathlib import Path
from typing import Protocol

import torch

from rmoe_megatron.config.model import ModelConfig, ModelDescription
from rmoe_megatron.data.batch import ClassConditions, Conditions, RawBatch, TextConditions
from rmoe_megatron.encoders.text import CaptionEncoder, encode_captions, load_text_encoder
from rmoe_megatron.errors import UserError
from rmoe_megatron.files.untrusted import shown
from rmoe_megatron.pretrained.safetensors_folder import SafetensorsFolder

NULL_TEXT = "null_text.safetensors"  # beside precomputed shards


class ConditionEncoder(Protocol):
    """Makes conditions for one kind of model."""

    @property
    def null(self) -> Conditions:
        """Return the conditions of the empty caption or the dropped label, [1, ...]."""
        ...

    def encode_batch(self, batch: RawBatch) -> Conditions:
        """Return the conditions of a raw batch."""
        ...

    def encode_prompts(self, prompts: list[str]) -> Conditions:
        """Return the conditions of prompts, [N, ...]."""
        ...


class CaptionConditions:
    """Token states float32 [B, L, D] and pooled embeddings [B, P] of captions."""

    def __init__(self, encoder: CaptionEncoder, null: Conditions | None) -> None:
        self.encoder = encoder
        self.null = null if null is not None else self.encode_prompts([""])

    def encode_batch(self, batch: RawBatch) -> Conditions:
        """Encode the captions of a raw batch."""
        assert batch.captions is not None
        return self.encode_prompts(batch.captions)

    def encode_prompts(self, prompts: list[str]) -> Conditions:
        """Encode captions."""
        text = encode_captions(self.encoder, prompts)
        return TextConditions(text.hidden_states, text.pooled)


class LabelConditions:
    """Class labels int64 [B]; the label after the last class is the dropped one."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        self.device = device
        self.null = ClassConditions(torch.tensor([num_classes], device=device))

    def encode_batch(self, batch: RawBatch) -> Conditions:
        """Return the labels of a raw batch."""
        assert batch.class_labels is not None
        return ClassConditions(batch.class_labels)

    def encode_prompts(self, prompts: list[str]) -> Conditions:
        """Read labels written as numbers."""
        return ClassConditions(torch.tensor([int(prompt) for prompt in prompts], device=self.device))


def build_condition_encoder(
    config: ModelDescription, device: torch.device, null_text: Path | None = None
) -> ConditionEncoder:
    """Return what makes the conditions of a run's model.

    Args:
        null_text: file with the empty caption's embedding, which lies beside precomputed shards; None encodes it.

    Raises:
        UserError: a text encoder is missing, or its embedding doesn't fit the stored one.
    """
    if config.model.is_class_conditional:
        return LabelConditions(config.model.num_classes, device)
    encoder = load_text_encoder(
        config.encoders, config.model.text_length, device, config.model.text_hidden_size
    )
    null = None
    if null_text is not None:
        null = read_null_text(null_text, config.model, device)
    return CaptionConditions(encoder, null)


def read_null_text(path: Path, model: ModelConfig, device: torch.device) -> Conditions:
    """Return the embedding of the empty caption that lies beside precomputed shards.

    Raises:
        UserError: the file cannot be read, or does not fit the model.
    """
    expected = {
        "text_hidden_states": (1, model.text_length, model.text_hidden_size),
        "text_pooled": (1, model.pooled_size),
    }
    source = SafetensorsFolder(path.parent, path.name)
    if source.shapes != expected:
        raise UserError(
            f"{path} holds {shown(source.shapes)} but the model of this configuration needs "
            f"{shown(expected)}; precompute the data again with this configuration."
        )
    return TextConditions(*(source.read(name).to(device) for name in expected))
