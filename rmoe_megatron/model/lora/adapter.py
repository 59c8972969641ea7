"""LoRA without its layers: keys, FLOPs, parameters, and how it is merged."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rmoe_megatron.config.model import LoraConfig, ModelConfig
from rmoe_megatron.config.require import require
from rmoe_megatron.model.adapter import Adapter, Join

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec

    from rmoe_megatron.model.precision.layers import Layers


class LoraAdapter(Adapter[LoraConfig]):
    """``B A x`` added to the projection of vision queries, keys and values."""

    name = "lora"
    weight_names: dict[str, str] = {}  # noqa: RUF012

    def check(self, model: ModelConfig, section: LoraConfig) -> None:
        """Check the rank."""
        require(
            section.rank <= model.hidden_size,
            f"lora.rank ({section.rank}) exceeds model.hidden_size ({model.hidden_size}), where a product of two factors "
            "has no use for it; choose a smaller rank.",
        )

    def spec(self, section: LoraConfig, layers: "Layers") -> "ModuleSpec":
        """Return the module ``Lora``, which has the same layers in every precision."""
        from rmoe_megatron.model.lora.layers import lora_spec

        return lora_spec(section)

    def multiply_adds(self, model: ModelConfig, section: LoraConfig, vision: int) -> float:
        """Return both factors of three projections."""
        return vision * 6 * model.hidden_size * section.rank

    def parameters(self, model: ModelConfig, section: LoraConfig) -> int:
        """Return the number of parameters of both factors."""
        return 6 * model.hidden_size * section.rank

    def merged(self, weight: Tensor, added: Mapping[str, Tensor], join: Join) -> Tensor:
        """Add ``up @ down`` of q, k and v (down [3 r, H], up [3, H, r]) to the projection [3 H, H] of a block."""
        down, up = added["down"].float(), added["up"].float()
        updates = torch.bmm(up, down.view(3, -1, down.shape[-1]))
        return (weight.float() + join(list(updates.unbind(0)))).to(weight.dtype)
