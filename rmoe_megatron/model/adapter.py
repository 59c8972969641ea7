"""What can be added to the attention of chosen blocks of a base model: the recurrence, or plain LoRA.

An adapter is one section of the configuration, one module of a block (under the adapter's name, after which its
parameters are called) and the numbers and names below. It can be asked without Megatron-Core being imported. Each has a
folder of its own with its layers beside it, and one entry in :mod:`rmoe_megatron.model.registry`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rmoe_megatron.config.model import ModelConfig, ModelDescription

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec

    from rmoe_megatron.model.precision.layers import Layers

# Makes the rows of the block's query, key and value projection of three weights.
Join = Any


class Adapter[Section](ABC):
    """One kind of adapter; ``Section`` is its section of the configuration."""

    name: str  # of the section, and of the module in a block

    def section(self, description: ModelDescription) -> Section | None:
        """Return the section of a model that has this adapter."""
        return getattr(description, self.name)

    def layers(self, description: ModelDescription) -> list[int]:
        """Return the blocks that it is added to."""
        section: Any = self.section(description)
        return [] if section is None else section.layers

    @abstractmethod
    def check(self, model: ModelConfig, section: Section) -> None:
        """Check the section.

        Raises:
            UserError: names the key, the value and what is allowed.
        """

    @abstractmethod
    def multiply_adds(self, model: ModelConfig, section: Section, vision: int) -> float:
        """Return what it adds to a block for an image of ``vision`` tokens."""

    @abstractmethod
    def parameters(self, model: ModelConfig, section: Section) -> int:
        """Return the number of parameters of one block's adapter, without those of experts."""

    def expert_parameters(self, model: ModelConfig, section: Section) -> int:
        """Return the number of parameters of one block's experts, which expert parallelism spreads."""
        return 0

    @abstractmethod
    def spec(self, section: Section, layers: "Layers") -> "ModuleSpec":
        """Return the module that takes the place of the attention in a block, built of ``layers``.

        This imports Megatron-Core; nothing else here does.
        """

    def transformer_settings(self, section: Section) -> dict[str, Any]:
        """Return what Megatron-Core's TransformerConfig must know of it."""
        return {}

    @property
    @abstractmethod
    def weight_names(self) -> Mapping[str, str]:
        """Return diffusers' names below the attention of a block, by those here; none if it is merged at export."""

    def merged(self, weight: Tensor, added: Mapping[str, Tensor], join: Join) -> Tensor:
        """Return a block's query, key and value projection with the adapter merged into it.

        Args:
            added: the adapter's tensors by their names in its module.
            join: makes the rows of the projection of weights of q, k and v.
        """
        raise NotImplementedError(f"{self.name} is exported beside the weights that it is added to")
