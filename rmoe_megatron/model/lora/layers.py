"""Plain low-rank adaptation of a block's vision Q/K/V projection: the baseline that the recurrence is compared with."""

import math
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from rmoe_megatron.config.model import LoraConfig
from rmoe_megatron.model.attention import Attention, Positions, split_heads


def lora_spec(lora: LoraConfig) -> ModuleSpec:
    """Return the module that takes the place of attention in a block with LoRA."""
    return ModuleSpec(module=Lora, params={"lora": lora})


class Lora(MegatronModule):
    """``B A x`` for each of Q, K and V (Hu et al., 2021, with alpha = rank), added to the base projection.

    ``down`` [3 r, H] starts Kaiming-uniform and ``up`` [3, H / TP, r] zero, so that a fresh one leaves its base
    unchanged. Every rank holds ``down`` and the rows of ``up`` for its own heads.
    """

    def __init__(
        self,
        config: TransformerConfig,
        lora: LoraConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.tp_group, self.dp_cp_group = pg_collection.tp, pg_collection.dp_cp
        hidden = config.hidden_size
        self.head_dim = hidden // config.num_attention_heads
        down = torch.empty(3 * lora.rank, hidden).uniform_(-1, 1).mul_(1 / math.sqrt(hidden))
        self.down = nn.Parameter(down.to(config.params_dtype))
        self.down.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # see model/sequence.py
        rows = hidden // self.tp_group.size()
        self.up = nn.Parameter(torch.zeros(3, rows, lora.rank, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.up, is_parallel=True, dim=1, stride=1)

    def forward(
        self,
        attention: Attention,
        vision: Tensor,
        text: Tensor | None,
        conditioning: Tensor,
        rng_keys: Tensor,
        positions: Positions | None = None,
        latent_steps: int | None = None,
        unmodulated: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the block's attention output for vision and text; arguments are those of the recurrence."""
        text_qkv = None if text is None else attention.project_text(text, positions)
        return attention(attention.project_vision(vision) + self.project(vision), text_qkv, positions)

    def project(self, hidden_states: Tensor) -> Tensor:
        """Project this rank's vision tokens [S / (CP TP), B, H] to its heads [S / CP, B, heads / TP, 3, head_dim]."""
        reduced = nn.functional.linear(hidden_states, self.down)
        if self.config.sequence_parallel:
            reduced = gather_from_sequence_parallel_region(reduced, group=self.tp_group)
        projected = torch.einsum("sbkr,khr->sbkh", reduced.unflatten(-1, (3, -1)), self.up).flatten(-2)
        return split_heads(projected, self.head_dim)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Shard the rows of ``up`` over tensor-parallel ranks."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"up": 1},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=self.dp_cp_group,
        )
