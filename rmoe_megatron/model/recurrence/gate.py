"""The gate of the recurrence: one expert per visual token and latent step."""

import copy

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import router_gating_linear
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from rmoe_megatron.config.model import RecurrenceConfig
from rmoe_megatron.counter_rng import Purpose, derive, gumbel
from rmoe_megatron.model.recurrence.adapter import TOKEN_INPUTS
from rmoe_megatron.model.recurrence.gate_watch import GateWatch
from rmoe_megatron.model.sequence import mark_partial, shard_index


class Gate(TopKRouter):
    """Megatron-Core's router with conditioning, Gumbel noise and a straight-through gradient.

    For token state a and conditioning s: ``logits = W_token a + W_conditioning s`` in float32; in training
    ``z = logits + Gumbel(0, 1)``, ``p = softmax(z / tau)``, the expert is ``argmax z`` and its weight is
    ``1 + p - stop_gradient(p)``: 1 forward, the gradient of p backward. Experts that are not picked are not evaluated
    and give no gradient. In evaluation the expert is ``argmax logits`` and its weight is 1.

    The load-balancing loss uses softmax(logits), which is the probability of an expert being picked: argmax of
    Gumbel-perturbed logits samples from it whatever tau is. It is that of a micro-batch (Megatron-Core sums over the
    ranks that share one), so its value depends on how a global batch is cut into micro-batches, not on the ranks.

    Every rank holds all weights and gates its own part of the sequence.

    Attributes:
        watch: what the decisions of training are put down in; None puts nothing down.
    """

    def __init__(
        self,
        config: TransformerConfig,
        recurrence: RecurrenceConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        without_bias = copy.copy(config)
        without_bias.add_bias_linear = False
        super().__init__(config=without_bias, pg_collection=pg_collection)
        self.set_layer_number(layer_number)
        self.tau = recurrence.tau
        if not set(TOKEN_INPUTS) & set(recurrence.gate_inputs):
            self.weight = None
        self.conditioning_weight = None
        if "conditioning" in recurrence.gate_inputs:
            self.conditioning_weight = nn.Parameter(
                torch.empty(config.num_moe_experts, config.hidden_size, dtype=config.params_dtype)
            )
            config.init_method(self.conditioning_weight)
        self.watch: GateWatch | None = None
        mark_partial(self, config)

    @torch.compiler.disable  # integers that wrap are not what the compiler writes fast code for
    def draw_noise(self, rng_keys: Tensor, tokens: int, steps: int) -> Tensor:
        """Return Gumbel noise float32 [T, S, B, M] for this rank's S tokens in T latent steps.

        Args:
            rng_keys: int64 [B], one key of the counter-based random numbers for every sample.
        """
        base = derive(rng_keys, Purpose.gumbel, self.layer_number)
        by_step = torch.stack([derive(base, step) for step in range(steps)])
        count = tokens * self.num_experts
        noise = gumbel(by_step, count, first=shard_index(self.config) * count)
        return noise.unflatten(-1, (tokens, self.num_experts)).transpose(1, 2)

    def gating(self, input: Tensor, conditioning: Tensor) -> Tensor:
        """Return float32 logits [S, B, M] from this rank's token states [S, B, H] and conditioning [1, B, H]."""
        logits: list[Tensor] = []
        if self.weight is not None:
            logits.append(router_gating_linear(input, self.weight, None, torch.float32))
        if self.conditioning_weight is not None:
            # Each rank's tokens give a part of the conditioning's gradient; its embedding wants the sum.
            conditioning = copy_to_tensor_model_parallel_region(conditioning, self.tp_group)
            logits.append(F.linear(conditioning.float(), self.conditioning_weight.float()))
        return sum(logits[1:], start=logits[0]).expand(*input.shape[:-1], self.num_experts)

    def forward(
        self, input: Tensor, conditioning: Tensor, noise: Tensor | None, latent_step: int, rng_keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Pick an expert for every token.

        Args:
            input: this rank's token states [S, B, H].
            conditioning: [1, B, H], after SiLU.
            noise: in training float32 [S, B, M], a latent step of :meth:`draw_noise`.
            latent_step: from 1.
            rng_keys: int64 [B], one key of the counter-based random numbers for every sample.

        Returns:
            Weights float32 [S * B, M] and the routing map bool [S * B, M], both zero where an expert is not picked.
        """
        logits = self.gating(input, conditioning).flatten(0, 1)
        logits = self.apply_z_loss(logits)
        perturbed = logits if noise is None else logits + noise.flatten(0, 1)
        # Not F.one_hot, which asks on the host whether there are so many classes.
        modules = torch.arange(self.num_experts, device=perturbed.device)
        routing_map = perturbed.argmax(dim=-1, keepdim=True) == modules
        weights = routing_map.float()
        if self.training:
            probability = torch.softmax(perturbed / self.tau, dim=-1)
            weights = weights + (probability - probability.detach())
        if self.training and torch.is_grad_enabled():
            weights = self._apply_aux_loss(weights, torch.softmax(logits, dim=-1), routing_map)
        if self.training and self.watch is not None:
            by_sample = (*input.shape[:-1], self.num_experts)
            self.watch.see(
                self.layer_number - 1,
                latent_step,
                rng_keys,
                logits.view(by_sample),
                routing_map.view(by_sample),
            )
        return weights, routing_map
