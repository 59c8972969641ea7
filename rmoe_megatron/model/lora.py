"""Plain low-rank adaptation of a block's vision Q/K/V projection: the baseline that the recurrence is compared with."""

import math

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from rmoe_megatron.config.schema import LoraConfig
from rmoe_megatron.model.attention import QueryKeyValue


class Lora(MegatronModule):
    """``B A x`` for each of Q, K and V (Hu et al., 2021, with alpha = rank), added to the base projection.

    ``down`` [3 r, H] starts Kaiming-uniform and ``up`` [3, H, r] zero, so that a fresh one leaves its base unchanged.
    """

    def __init__(self, config: TransformerConfig, lora: LoraConfig) -> None:
        super().__init__(config=config)
        hidden = config.hidden_size
        self.head_dim = hidden // config.num_attention_heads
        down = torch.empty(3 * lora.rank, hidden).uniform_(-1, 1).mul_(1 / math.sqrt(hidden))
        self.down = nn.Parameter(down.to(config.params_dtype))
        self.up = nn.Parameter(torch.zeros(3, hidden, lora.rank, dtype=config.params_dtype))

    def forward(self, hidden_states: Tensor) -> QueryKeyValue:
        """Project vision tokens [S, B, H]."""
        reduced = nn.functional.linear(hidden_states, self.down).unflatten(-1, (3, -1))
        projected = torch.einsum("sbkr,khr->sbkh", reduced, self.up).flatten(-2)
        return QueryKeyValue.from_parts(projected, self.head_dim)
