"""SD3's joint attention: vision and text tokens have their own projections and attend to each other.

It is handed queries, keys and values and knows nothing of where they come from; the recurrence calls it once per
latent step.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

QK_NORM_EPS = 1.0e-6


class QueryKeyValue(NamedTuple):
    """Queries, keys and values of one stream, each [S, B, heads / TP, head_dim]."""

    query: Tensor
    key: Tensor
    value: Tensor

    def __add__(self, other: "QueryKeyValue") -> "QueryKeyValue":  # type: ignore[override]
        return QueryKeyValue(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


class QueryKeyNorm(nn.Module):
    """RMSNorm of queries and keys over the head dimension (SD3.5)."""

    def __init__(self, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.query_weight = nn.Parameter(torch.ones(head_dim, dtype=dtype))
        self.key_weight = nn.Parameter(torch.ones(head_dim, dtype=dtype))

    def forward(self, qkv: QueryKeyValue) -> QueryKeyValue:
        """Normalise query and key; the value is returned as it is."""
        query = F.rms_norm(qkv.query, self.query_weight.shape, self.query_weight, QK_NORM_EPS)
        key = F.rms_norm(qkv.key, self.key_weight.shape, self.key_weight, QK_NORM_EPS)
        return QueryKeyValue(query, key, qkv.value)


@dataclass
class JointAttentionSubmodules:
    """What computes ``softmax(q k^T) v``: Megatron-Core's DotProductAttention or Transformer Engine's."""

    core_attention: ModuleSpec | type


class JointAttention(MegatronModule):
    """Joint attention of one block.

    Args:
        context_pre_only: the last block of SD3: text gives keys and values but receives no output.
        qk_norm: RMSNorm on queries and keys.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: JointAttentionSubmodules,
        layer_number: int,
        context_pre_only: bool,
        qk_norm: bool,
    ) -> None:
        super().__init__(config=config)
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.linear_qkv = self._linear_qkv()
        self.linear_qkv_context = self._linear_qkv()
        self.qk_norm = QueryKeyNorm(self.head_dim, config.params_dtype) if qk_norm else None
        self.qk_norm_context = QueryKeyNorm(self.head_dim, config.params_dtype) if qk_norm else None
        self.core_attention = build_module(
            submodules.core_attention,
            config=config,
            layer_number=layer_number,
            attn_mask_type=AttnMaskType.no_mask,
            attention_type="self",
        )
        self.linear_proj = self._linear_proj()
        self.linear_proj_context = None if context_pre_only else self._linear_proj()

    def _linear_qkv(self) -> ColumnParallelLinear:
        return ColumnParallelLinear(
            self.config.hidden_size,
            3 * self.config.hidden_size,
            config=self.config,
            init_method=self.config.init_method,
        )

    def _linear_proj(self) -> RowParallelLinear:
        return RowParallelLinear(
            self.config.hidden_size,
            self.config.hidden_size,
            config=self.config,
            init_method=self.config.output_layer_init_method,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
        )

    def project_vision(self, hidden_states: Tensor) -> QueryKeyValue:
        """Project vision tokens [S, B, H] with the block's own weights; not normalised yet."""
        return self.split_heads(self.linear_qkv(hidden_states)[0])

    def project_text(self, hidden_states: Tensor) -> QueryKeyValue:
        """Project text tokens [L, B, H] and normalise; independent of the latent step, so called once per block."""
        qkv = self.split_heads(self.linear_qkv_context(hidden_states)[0])
        return self.qk_norm_context(qkv) if self.qk_norm_context else qkv

    def split_heads(self, mixed: Tensor) -> QueryKeyValue:
        """Split [S, B, 3 H / TP] whose rows are ordered (head, q|k|v, head_dim), so that TP splits whole heads."""
        return QueryKeyValue(*mixed.view(*mixed.shape[:-1], -1, 3, self.head_dim).unbind(dim=-2))

    def forward(self, vision: QueryKeyValue, text: QueryKeyValue) -> tuple[Tensor, Tensor | None]:
        """Attend over both streams; returns the attention output of vision [S, B, H] and of text [L, B, H] or None.

        Args:
            vision: not normalised; the QK norm acts on the sum of base and module projections.
            text: normalised, from :meth:`project_text`.
        """
        if self.linear_proj_context is None:
            return self.attend_vision(vision, text), None
        vision = self.qk_norm(vision) if self.qk_norm else vision
        joint = QueryKeyValue(*(torch.cat(parts) for parts in zip(text, vision, strict=True)))
        output_text, output_vision = self.core_attention(*joint, attention_mask=None).split(
            [text.query.shape[0], vision.query.shape[0]]
        )
        return self.linear_proj(output_vision)[0], self.linear_proj_context(output_text)[0]

    def attend_vision(self, vision: QueryKeyValue, text: QueryKeyValue) -> Tensor:
        """Attend from the vision tokens alone to both streams; returns [S, B, H]."""
        vision = self.qk_norm(vision) if self.qk_norm else vision
        key, value = torch.cat((text.key, vision.key)), torch.cat((text.value, vision.value))
        return self.linear_proj(
            self.core_attention(vision.query.contiguous(), key, value, attention_mask=None)
        )[0]
