"""What a family of transformers is: all that differs between MM-DiT, DiT and whichever comes next.

A family can be asked without Megatron-Core being imported. Each has a folder of its own with its layers beside it, and one
entry in :mod:`rmoe_megatron.model.registry`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rmoe_megatron.config.model import ModelConfig, ModelDescription

if TYPE_CHECKING:
    from rmoe_megatron.model.diffusion_transformer import DiffusionTransformer

TIMESTEP_CHANNELS = 256  # sinusoidal features of diffusers' timestep embedding


@dataclass(frozen=True)
class WeightNames:
    """How diffusers names a family's weights; modules hold ``weight`` and ``bias``.

    Attributes:
        attention: the block's attention; what is added to the attention has its names below it.
        modules: the layers of a block, by the names they have here.
        projections: query, key and value of a block, which are one layer here.
        tensors: single ones of a block.
        ends: modules before and after the blocks, where names differ.
    """

    attention: str
    modules: Mapping[str, str]
    projections: Mapping[str, tuple[str, str, str]]
    tensors: Mapping[str, str] = field(default_factory=dict)
    ends: Mapping[str, str] = field(default_factory=dict)


class Family(ABC):
    """A family of transformers over image patches, conditioned on a timestep and on text or a class."""

    name: str  # in error messages
    weights: WeightNames

    @abstractmethod
    def transformer(self) -> "type[DiffusionTransformer]":
        """Return the class of its layers. This imports Megatron-Core; nothing else here does."""

    @abstractmethod
    def check(self, description: ModelDescription) -> None:
        """Check the keys of the model section that are this family's, and refuse those of others.

        Raises:
            UserError: names the key, the value and what is allowed.
        """

    @abstractmethod
    def conditioning_multiply_adds(self, model: ModelConfig) -> float:
        """Return multiply-adds of embedding an image's conditions."""

    @abstractmethod
    def block_multiply_adds(self, model: ModelConfig, layer: int, vision: int) -> float:
        """Return multiply-adds of block ``layer`` without what is added to it: projections, MLP, modulation, attention.

        Args:
            vision: tokens of an image.
        """

    @abstractmethod
    def conditioning_parameters(self, model: ModelConfig) -> int:
        """Return the number of parameters that embed the conditions."""

    @abstractmethod
    def block_parameters(self, model: ModelConfig, layer: int) -> int:
        """Return the number of parameters of block ``layer`` without what is added to it."""


def attention_multiply_adds(queries: int, keys: int, hidden: int) -> float:
    """Return multiply-adds of scores and weighted values."""
    return 2 * queries * keys * hidden


def vision_tokens(model: ModelConfig) -> int:
    """Return the number of patches of a square image of the model's size."""
    return (model.sample_size // model.patch_size) ** 2


def linear_parameters(inputs: int, outputs: int) -> int:
    """Return the number of parameters of a linear layer with a bias."""
    return inputs * outputs + outputs


def attention_parameters(model: ModelConfig) -> int:
    """Return the number of parameters of one stream's projections, in and out, and QK norms."""
    hidden = model.hidden_size
    return (
        linear_parameters(hidden, 3 * hidden) + linear_parameters(hidden, hidden) + qk_norm_parameters(model)
    )


def qk_norm_parameters(model: ModelConfig) -> int:
    """Return the number of parameters of the norms of one stream's queries and keys."""
    return 2 * model.hidden_size // model.num_attention_heads if model.qk_norm else 0


def stream_parameters(model: ModelConfig) -> int:
    """Return the number of parameters of one stream of a block: attention, MLP, modulation."""
    hidden = model.hidden_size
    mlp = linear_parameters(hidden, 4 * hidden) + linear_parameters(4 * hidden, hidden)
    return attention_parameters(model) + mlp + linear_parameters(hidden, 6 * hidden)


def timestep_parameters(model: ModelConfig) -> int:
    """Return the number of parameters of the timestep's embedding."""
    hidden = model.hidden_size
    return linear_parameters(TIMESTEP_CHANNELS, hidden) + linear_parameters(hidden, hidden)
