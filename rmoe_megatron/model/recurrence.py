"""The recursion of "The Thinking Pixel" (arXiv 2604.25299): vision tokens refined for T latent steps.

In every step the gate picks one of M modules for each vision token, the module projects the token to a query, key and
value, and attention (in MM-DiT joint with the fixed text) gives the next token state. The block's own projection of the vision
tokens joins in the last step only.
"""

from dataclasses import dataclass

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from rmoe_megatron.config.schema import RecurrenceConfig
from rmoe_megatron.model.attention import Attention, QueryKeyValue
from rmoe_megatron.model.dispatch import QueryKeyValueDispatcher
from rmoe_megatron.model.gate import Gate
from rmoe_megatron.model.modulation import Modulation, layer_norm, modulate


@dataclass
class RecurrenceSubmodules:
    """The grouped projections of the modules."""

    experts: ModuleSpec | type


class Recurrence(MegatronModule):
    """Gate, step modulation, experts and their dispatch for the attention of one block."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: RecurrenceSubmodules,
        recurrence: RecurrenceConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.steps = recurrence.steps
        self.gate = Gate(config, recurrence, layer_number, pg_collection)
        self.modulation = Modulation(config, num_vectors=2) if recurrence.modulation else None
        self.experts = build_module(
            submodules.experts, config=config, recurrence=recurrence, pg_collection=pg_collection
        )
        local = self.experts.num_local_experts
        first = pg_collection.ep.rank() * local
        self.dispatcher = QueryKeyValueDispatcher(
            local, list(range(first, first + local)), config=config, pg_collection=pg_collection
        )

    def forward(
        self, attention: Attention, vision: Tensor, text: Tensor | None, conditioning: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return the block's attention output for vision [S, B, H] and text [L, B, H] (None in SD3's last block and DiT).

        Args:
            attention: the block's attention.
            vision: modulated vision tokens, [S, B, H].
            text: modulated text tokens, [L, B, H]; None in DiT.
            conditioning: [1, B, H], after SiLU.
            keys: int64 [B], the samples' keys of the counter-based random numbers.
        """
        text_qkv = None if text is None else attention.project_text(text)
        state = vision
        for step in range(self.steps - 1):
            module_qkv = self.apply_modules(attention, state, conditioning, keys, step)
            state = vision + attention.attend_vision(module_qkv, text_qkv)
        module_qkv = self.apply_modules(attention, state, conditioning, keys, self.steps - 1)
        return attention(module_qkv + attention.project_vision(vision), text_qkv)

    def apply_modules(
        self, attention: Attention, state: Tensor, conditioning: Tensor, keys: Tensor, step: int
    ) -> QueryKeyValue:
        """Project token states [S, B, H] with the module that the gate picks for each."""
        weights, routing_map = self.gate(state, conditioning, keys, step)
        if self.modulation is None:
            tokens = layer_norm(state)
        else:
            scale, shift = self.modulation(conditioning)
            tokens = modulate(state, shift, scale)
        tokens, weights = self.dispatcher.dispatch_preprocess(tokens, routing_map, weights)
        tokens, weights = self.dispatcher.token_dispatch(tokens, weights)
        tokens, tokens_per_expert, weights = self.dispatcher.dispatch_postprocess(tokens, weights)
        projected = self.dispatcher.combine_preprocess(self.experts(tokens, tokens_per_expert, weights))
        projected = self.dispatcher.combine_postprocess(self.dispatcher.token_combine(projected))
        return QueryKeyValue.from_parts(projected, attention.head_dim)
