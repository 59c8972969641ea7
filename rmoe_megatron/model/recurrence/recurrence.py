"""The recursion of "The Thinking Pixel" (arXiv 2604.25299): vision tokens refined for T latent steps.

With x the modulated vision tokens, c the modulated text tokens, y the conditioning vector and W the block's own
projection of vision tokens to queries, keys and values:

    a_0 = x
    m_t(i) = gate(a_{t-1}[i], y)                                    one of M experts for every vision token i
    q, k, v = B_m A_m Mod(LN(a_{t-1}))                              in steps t = 1 .. T - 1
    a_t = JointAttention(q, k, v; c) + x
    q, k, v = B_m A_m Mod(LN(a_{T-1})) + W x                        in step T: the base joins here only
    output = JointAttention(q, k, v; c)                             of both streams, with the output projection

Queries, keys and values of the text don't depend on t. :mod:`rmoe_megatron.model.reference` is the same in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from rmoe_megatron.config.model import RecurrenceConfig
from rmoe_megatron.model.attention import Attention, Positions, QueryKeyValue, split_heads
from rmoe_megatron.model.modulation import Modulation, layer_norm, modulate
from rmoe_megatron.model.recurrence.dispatch import QueryKeyValueDispatcher
from rmoe_megatron.model.recurrence.experts import Experts
from rmoe_megatron.model.recurrence.gate import Gate
from rmoe_megatron.model.sequence import sequence_to_heads


@dataclass
class RecurrenceSubmodules:
    """The grouped projections of the experts."""

    experts: Callable[..., Experts]


def recurrence_spec(recurrence: RecurrenceConfig, experts: Callable[..., Experts]) -> ModuleSpec:
    """Return the module that takes the place of attention in a block with recurrence; ``experts`` makes its experts."""
    submodules = RecurrenceSubmodules(experts=experts)
    return ModuleSpec(module=Recurrence, submodules=submodules, params={"recurrence": recurrence})


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
        self.sees_unmodulated = "unmodulated_tokens" in recurrence.gate_inputs
        self.recompute = config.recompute_granularity == "selective"
        self.gate = Gate(config, recurrence, layer_number, pg_collection)
        self.modulation = Modulation(config, num_vectors=2) if recurrence.modulation else None
        self.experts = submodules.experts(config=config, recurrence=recurrence, pg_collection=pg_collection)
        local = self.experts.num_local_experts
        first = pg_collection.ep.rank() * local
        self.dispatcher = QueryKeyValueDispatcher(
            local, list(range(first, first + local)), config=config, pg_collection=pg_collection
        )

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
        """Return the block's attention output for vision [S, B, H] and text [L, B, H] (None in SD3's last block and DiT).

        Args:
            attention: the block's attention.
            vision: this rank's modulated vision tokens, [S / (CP TP), B, H].
            text: likewise text tokens, [L_pad / (CP TP), B, H]; None in DiT.
            conditioning: [1, B, H], after SiLU.
            rng_keys: int64 [B], one key of the counter-based random numbers for every sample.
            positions: the rotary positions, for a model that has them; they are the same in every latent step.
            latent_steps: T of this call; None is the configured number.
            unmodulated: the vision tokens before normalisation and modulation, for a gate that is to see no timestep in them.
        """
        steps = self.steps if latent_steps is None else latent_steps
        text_qkv = None if text is None else attention.project_text(text, positions)
        noise = self.gate.draw_noise(rng_keys, len(vision), steps) if self.training else [None] * steps
        # What the latent steps have in common.
        scale, shift = self.modulation(conditioning) if self.modulation is not None else (None, None)
        # From the state to what the gate sees of it: the normalised token in the place of the modulated one.
        to_gate = None
        if self.sees_unmodulated:
            assert unmodulated is not None
            to_gate = layer_norm(unmodulated) - vision
        shared = (conditioning, scale, shift, to_gate)

        def latent_step(step: int, state: Tensor, *inputs: Tensor | None) -> Tensor:
            expert_qkv = self.apply_experts(
                attention, state, noise[step], step + 1, rng_keys, *inputs[: len(shared)]
            )
            text = inputs[len(shared) :]
            text_qkv = QueryKeyValue(*text) if text else None  # type: ignore[arg-type]
            return attention.attend_vision(expert_qkv, text_qkv, positions)

        state = vision
        for step in range(steps - 1):
            inputs = (state, *shared, *(text_qkv or ()))
            if self.recompute and self.training:
                attended = checkpoint(partial(latent_step, step), False, *inputs)
            else:
                attended = latent_step(step, *inputs)
            state = vision + attended
        expert_qkv = self.apply_experts(attention, state, noise[-1], steps, rng_keys, *shared)
        return attention(expert_qkv + attention.project_vision(vision), text_qkv, positions)

    @torch.compiler.disable  # how many tokens an expert gets is known on the host only
    def apply_experts(
        self,
        attention: Attention,
        state: Tensor,
        noise: Tensor | None,
        latent_step: int,
        rng_keys: Tensor,
        conditioning: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        to_gate: Tensor | None,
    ) -> Tensor:
        """Project token states [S, B, H] with the expert that the gate picks for each.

        With sequence parallelism a rank gates and dispatches its own tokens [S / TP, B, H]; an all-to-all then turns
        all heads of these tokens into this rank's heads of all tokens, [S, B, heads / TP, 3, head_dim].

        Args:
            noise: Gumbel noise that the gate adds in this latent step, float32 [S, B, M]; None in evaluation.
            latent_step: from 1.
            rng_keys: int64 [B], one key of the counter-based random numbers for every sample.
            conditioning: [1, B, H], after SiLU.
            scale: step modulation [1, B, H], as shift; None without it.
            to_gate: [S, B, H], what the gate sees beside the state; None is the state alone.
        """
        seen = state if to_gate is None else state + to_gate
        weights, routing_map = self.gate(seen, conditioning, noise, latent_step, rng_keys)
        tokens = layer_norm(state) if scale is None or shift is None else modulate(state, shift, scale)
        projected = self.dispatcher.apply(self.experts, tokens, routing_map, weights)
        return split_heads(sequence_to_heads(projected), attention.head_dim)
