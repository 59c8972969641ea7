"""``softmax(q k^T) v`` that keeps no scores: PyTorch's fused attention in the place of Megatron-Core's DotProductAttention."""

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class ScaledDotProductAttention(MegatronModule):
    """Attention of all queries to all keys through ``torch.nn.functional.scaled_dot_product_attention``.

    Megatron-Core's DotProductAttention, whose interface this is, keeps the scores [B, heads, S, S] for the backward pass: 0.9 GB
    for one image of 1024 pixels and one call. The fused kernels (CPU and CUDA) compute them in tiles, twice.

    Args:
        settings: what Megatron-Core's specs hand to a core attention and a single kind of attention does not need.
    """

    def __init__(self, config: TransformerConfig, **settings: Any) -> None:
        super().__init__(config=config)

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
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        output = F.scaled_dot_product_attention(query, key, value)  # [B, heads / TP, S, head_dim]
        return output.permute(2, 0, 1, 3).flatten(2)
