"""Attention of the blocks: of vision tokens among themselves (DiT), or joint with text tokens (SD3).

It is handed queries, keys and values and knows nothing of where they come from; the recurrence calls it once per
latent step. A rank has its own heads and, with context parallelism, the queries of its own tokens [S / CP, B, ...]; keys
and values are gathered over the context-parallel ranks.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from rmoe_megatron.hf.rotary import Rotary, rotate
from rmoe_megatron.model.rms_norm import rms_norm
from rmoe_megatron.model.sequence import gather_context, mark_partial

QK_NORM_EPS = 1.0e-6


class QueryKeyValue(NamedTuple):
    """Normalised queries, keys and values of one stream, each [S / CP, B, heads / TP, head_dim]."""

    query: Tensor
    key: Tensor
    value: Tensor


class Positions(NamedTuple):
    """Rotary positions of this rank's tokens: of vision [S / CP, head_dim], and of text [L_pad / CP, head_dim] if it has any."""

    vision: Rotary
    text: Rotary | None


def split_heads(projected: Tensor, head_dim: int) -> Tensor:
    """View [S, B, 3 H] with q, k and v side by side as heads [S, B, heads, 3, head_dim]."""
    return projected.unflatten(-1, (3, -1, head_dim)).transpose(-3, -2)


def join_streams(text: Tensor, vision: Tensor) -> Tensor:
    """Put two streams of heads together, [L, B, heads, head_dim] and [S, B, heads, head_dim] to [L + S, B, heads, head_dim].

    In memory the result is [B, heads, L + S, head_dim], as kernels of attention want it: a copy less for each of q, k and v.
    """
    return torch.cat((text.permute(1, 2, 0, 3), vision.permute(1, 2, 0, 3)), dim=2).permute(2, 0, 1, 3)


def without_own_value(attended: Tensor, own: Tensor) -> Tensor:
    """Take out of every head's output its part along the token's own value (exclusive self-attention).

    Args:
        attended: [S, B, heads head_dim].
        own: values [S, B, heads, head_dim]; where one is zero the output stays.
    """
    heads, values = attended.view_as(own).float(), own.float()
    share = (heads * values).sum(-1, keepdim=True) / values.square().sum(-1, keepdim=True).clamp_min(1e-12)
    return (heads - share * values).flatten(2).to(attended.dtype)


class QueryKeyNorm(nn.Module):
    """RMSNorm of queries and keys over the head dimension (SD3.5); every rank holds the weights and has its own heads."""

    def __init__(self, head_dim: int, config: TransformerConfig) -> None:
        super().__init__()
        self.query_weight = nn.Parameter(torch.ones(head_dim, dtype=config.params_dtype))
        self.key_weight = nn.Parameter(torch.ones(head_dim, dtype=config.params_dtype))
        mark_partial(self, config)

    def forward(self, qkv: Tensor) -> QueryKeyValue:
        """Normalise queries and keys of heads [S, B, heads / TP, 3, head_dim] together; values are returned as they are."""
        query_key, value = qkv.split((2, 1), dim=-2)
        weight = torch.stack((self.query_weight, self.key_weight))
        normalised = rms_norm(query_key, weight, QK_NORM_EPS)
        query, key = normalised.unbind(dim=-2)
        return QueryKeyValue(query, key, value.squeeze(-2))


@dataclass
class AttentionSubmodules:
    """What makes an attention's layers, each with the interface of Megatron-Core's layers of that name.

    Attributes:
        linear_qkv: projection of hidden states to queries, keys and values.
        linear_proj: output projection.
        core_attention: ``softmax(q k^T) v``.
    """

    linear_qkv: Callable[..., MegatronModule]
    linear_proj: Callable[..., MegatronModule]
    core_attention: Callable[..., MegatronModule]


class Attention(MegatronModule):
    """What both attentions do for the vision tokens; subclasses build the layers."""

    linear_qkv: MegatronModule
    linear_proj: MegatronModule
    qk_norm: QueryKeyNorm | None
    core_attention: MegatronModule

    def __init__(self, config: TransformerConfig, submodules: AttentionSubmodules) -> None:
        super().__init__(config=config)
        self.submodules = submodules
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.recompute = config.recompute_granularity == "selective"
        self.exclusive = False  # set by the block

    def _linear_qkv(self) -> MegatronModule:
        return self.submodules.linear_qkv(
            self.config.hidden_size,
            3 * self.config.hidden_size,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=True,
            skip_bias_add=False,
            is_expert=False,
        )

    def _qk_norm(self, qk_norm: bool) -> QueryKeyNorm | None:
        return QueryKeyNorm(self.head_dim, self.config) if qk_norm else None

    def _core_attention(self, layer_number: int) -> MegatronModule:
        whole_keys = copy.copy(self.config)
        whole_keys.context_parallel_size = 1  # keys and values are gathered before
        return self.submodules.core_attention(
            config=whole_keys,
            layer_number=layer_number,
            attn_mask_type=AttnMaskType.no_mask,
            attention_type="self",
        )

    def _linear_proj(self) -> MegatronModule:
        return self.submodules.linear_proj(
            self.config.hidden_size,
            self.config.hidden_size,
            config=self.config,
            init_method=self.config.output_layer_init_method,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
            is_expert=False,
        )

    def project_vision(self, hidden_states: Tensor) -> Tensor:
        """Project this rank's vision tokens [S / (CP TP), B, H] with the block's own weights.

        Returns:
            Heads [S / CP, B, heads / TP, 3, head_dim] of q, k and v, not normalised yet.
        """
        return self.project(self.linear_qkv, hidden_states)

    def project(self, linear_qkv: MegatronModule, hidden_states: Tensor) -> Tensor:
        """Project tokens to heads; rows of the weight are ordered (head, q|k|v, head_dim), so that TP splits whole heads."""
        return linear_qkv(hidden_states)[0].unflatten(-1, (-1, 3, self.head_dim))

    def normalise_and_gather(
        self, qkv: Tensor, norm: QueryKeyNorm | None, rotary: Rotary | None
    ) -> QueryKeyValue:
        """Return normalised queries of this rank's tokens [S / CP, ...] with keys and values of all tokens [S, ...].

        Args:
            rotary: turns queries and keys of this rank's tokens, [S / CP, head_dim]; None leaves them.
        """
        query, key, value = norm(qkv) if norm else qkv.unbind(dim=-2)
        if rotary is not None:
            query, key = (
                rotate(each.permute(1, 2, 0, 3), rotary).permute(2, 0, 1, 3) for each in (query, key)
            )
        return QueryKeyValue(query, gather_context(key, self.config), gather_context(value, self.config))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, own: Tensor) -> Tensor:
        """Return ``softmax(q k^T) v`` [S, B, H / TP] from [S, B, heads / TP, head_dim].

        Args:
            own: the values of the tokens that ask, as many as queries; used by exclusive attention alone.
        """
        if self.recompute and self.training:
            attended = checkpoint(self.core_attention, False, query, key, value, None)
        else:
            attended = self.core_attention(query, key, value, attention_mask=None)
        return without_own_value(attended, own) if self.exclusive else attended

    def attend_vision(
        self, vision: Tensor, text: QueryKeyValue | None, positions: Positions | None = None
    ) -> Tensor:
        """Attend from the vision tokens alone, to themselves and to text where there is any.

        Args:
            vision: heads [S / CP, B, heads / TP, 3, head_dim], not normalised; the QK norm acts on the sum of base and module projections.
            text: from :meth:`JointAttention.project_text`.
            positions: the rotary positions, for a model that has them.

        Returns:
            [S / (CP TP), B, H], this rank's tokens.
        """
        query, key, value = self.normalise_and_gather(
            vision, self.qk_norm, None if positions is None else positions.vision
        )
        if text is not None:
            keys, values = join_streams(text.key, key), join_streams(text.value, value)
        else:
            keys, values = key, value
        return self.linear_proj(self.attend(query, keys, values, own=value))[0]


class SelfAttention(Attention):
    """Attention of the vision tokens among themselves: DiT's, and the second one of SD3.5-medium's first blocks."""

    def __init__(
        self, config: TransformerConfig, submodules: AttentionSubmodules, layer_number: int, qk_norm: bool
    ) -> None:
        super().__init__(config, submodules)
        self.linear_qkv = self._linear_qkv()
        self.qk_norm = self._qk_norm(qk_norm)
        self.core_attention = self._core_attention(layer_number)
        self.linear_proj = self._linear_proj()

    def forward(
        self, vision: Tensor, text: QueryKeyValue | None = None, positions: Positions | None = None
    ) -> tuple[Tensor, None]:
        """Return the attention output of vision [S / (CP TP), B, H] and None for the text that there is not."""
        return self.attend_vision(vision, text, positions), None


class JointAttention(Attention):
    """SD3's joint attention: vision and text tokens have their own projections and attend to each other.

    Args:
        context_pre_only: the last block of SD3: text gives keys and values but receives no output.
        qk_norm: RMSNorm on queries and keys.
        text_length: tokens of text without the padding that spreads them evenly over ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: AttentionSubmodules,
        layer_number: int,
        context_pre_only: bool,
        qk_norm: bool,
        text_length: int,
    ) -> None:
        super().__init__(config, submodules)
        self.text_length = text_length
        self.linear_qkv = self._linear_qkv()
        self.linear_qkv_context = self._linear_qkv()
        self.qk_norm = self._qk_norm(qk_norm)
        self.qk_norm_context = self._qk_norm(qk_norm)
        self.core_attention = self._core_attention(layer_number)
        self.linear_proj = self._linear_proj()
        self.linear_proj_context = None if context_pre_only else self._linear_proj()

    def project_text(self, hidden_states: Tensor, positions: Positions | None = None) -> QueryKeyValue:
        """Project text tokens [L_pad / (CP TP), B, H]; independent of the latent step, so called once per block.

        Returns:
            Normalised queries of this rank's tokens [L_pad / CP, ...], keys and values of all text [L, ...].
        """
        qkv = self.project(self.linear_qkv_context, hidden_states)
        query, key, value = self.normalise_and_gather(
            qkv, self.qk_norm_context, None if positions is None else positions.text
        )
        if self.linear_proj_context is None and self.qk_norm_context is not None:
            # Nothing asks with the last block's text queries. A gradient of zero instead of none tells overlapped
            # reductions that the weight is done.
            key = key.addcmul(self.qk_norm_context.query_weight, key.new_zeros(()))
        return QueryKeyValue(query, key[: self.text_length], value[: self.text_length])

    def forward(
        self, vision: Tensor, text: QueryKeyValue, positions: Positions | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over both streams.

        Args:
            vision: heads [S / CP, B, heads / TP, 3, head_dim], not normalised; the QK norm acts on the sum of base and module projections.
            text: from :meth:`project_text`.
            positions: the rotary positions, for a model that has them.

        Returns:
            The attention output of this rank's tokens, vision [S / (CP TP), B, H] and text [L_pad / (CP TP), B, H] or
            None.
        """
        if self.linear_proj_context is None:
            return self.attend_vision(vision, text, positions), None
        normalised = self.normalise_and_gather(
            vision, self.qk_norm, None if positions is None else positions.vision
        )
        query, key, value = (join_streams(*parts) for parts in zip(text, normalised, strict=True))
        own = value
        if self.exclusive and len(text.query) > len(text.value):  # padding has no value
            padding = (0, 0, 0, 0, 0, 0, 0, len(text.query) - len(text.value))
            own = join_streams(nn.functional.pad(text.value, padding), normalised.value)
        output_text, output_vision = self.attend(query, key, value, own).tensor_split([text.query.shape[0]])
        return self.linear_proj(output_vision)[0], self.linear_proj_context(output_text)[0]
