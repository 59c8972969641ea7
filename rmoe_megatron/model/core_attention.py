"""Attention in the place of Megatron-Core's DotProductAttention, which keeps the scores of every call for the backward pass."""

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from rmoe_megatron.distributed.processor import bf16_is_fast
from rmoe_megatron.model.softmax_attention import Way, attend_by_products, attend_fused, way_to_attend


class ScaledDotProductAttention(MegatronModule):
    """Attention of all queries to all keys, with the interface of Megatron-Core's DotProductAttention.

    That one keeps the scores in the backward pass whatever their size: 0.9 GB for one image of 1024 pixels and one call.

    Args:
        settings: what Megatron-Core's specs hand to a core attention and a single kind of attention does not need.
    """

    def __init__(self, config: TransformerConfig, **settings: Any) -> None:
        super().__init__(config=config)
        # Asked here, not in forward(), where the compiler could not trace the timing.
        self.bf16_is_fast = config.params_dtype is torch.bfloat16 and bf16_is_fast()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            query: [S, B, heads / TP, head_dim]; key and value [S', B, heads / TP, head_dim].
            attention_mask: has to be None.

        Returns:
            [S, B, H / TP].
        """
        assert attention_mask is None
        rows = query.shape[0] * query.shape[1] * query.shape[2]
        way = way_to_attend(query.device, query.dtype, rows, key.shape[0], self.bf16_is_fast)
        if way is Way.products:
            return attend_by_products(query, key, value)
        return attend_fused(query, key, value)
