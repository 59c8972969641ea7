"""Token dispatch of the recurrence: Megatron-Core's all-to-all, with Q, K and V coming back for every token."""

import torch
from megatron.core.transformer.moe.moe_utils import permute, unpermute
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from rmoe_megatron.model.recurrence.experts import Experts


class QueryKeyValueDispatcher(MoEAlltoAllTokenDispatcher):
    """The all-to-all dispatcher for experts that return 3 H values for a token of H.

    Megatron-Core restores the shape of what was sent; here the last dimension is that of what comes back.
    """

    hidden_shape: tuple[int, ...]
    hidden_shape_before_permute: tuple[int, ...]
    probs: Tensor | None
    routing_map: Tensor | None
    reversed_local_input_permutation_mapping: Tensor | None

    def apply(
        self,
        experts: Experts,
        tokens: Tensor,
        routing_map: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Send every token to the rank of its expert, apply the expert there, and bring the result back.

        Args:
            experts: the experts on this rank.
            tokens: this rank's, [S, B, H].
            routing_map: bool [S * B, M], where a token goes.
            weights: float32 [S * B, M], with which weight.

        Returns:
            [S, B, 3 H] in the order of ``tokens``.
        """
        if self.ep_size * self.tp_size == 1:
            return self._apply_here(experts, tokens, routing_map, weights)
        try:
            sent, sent_weights = self.token_dispatch(*self.dispatch_preprocess(tokens, routing_map, weights))
            received, tokens_per_expert, received_weights = self.dispatch_postprocess(sent, sent_weights)
            projected = experts(received, tokens_per_expert, received_weights)
            return self.combine_postprocess(self.token_combine(self.combine_preprocess(projected)))
        finally:
            self._forget_call()

    def _forget_call(self) -> None:
        """Let go of the tensors that Megatron-Core keeps from one part of a call to the next.

        The weights know the graph that they come from; it leads to the parameters, and over the hooks of data parallelism to
        the whole model and this dispatcher. Python cannot see that circle, so no model that has made a step would be freed.
        """
        self.probs = self.routing_map = self.reversed_local_input_permutation_mapping = None

    def _apply_here(
        self,
        experts: Experts,
        tokens: Tensor,
        routing_map: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Do the same where all experts are on this rank: nothing is sent, so the host need not know how much would be."""
        states = tokens.flatten(0, 1)
        if not experts.sorts(states):
            picked = torch.where(routing_map, weights, 0).sum(dim=1)
            projected = experts(states, routing_map.sum(dim=0), picked, routing_map)
            return projected.view(*tokens.shape[:-1], -1)
        sorted_states, sorted_weights, order, *_ = permute(
            states,
            routing_map,
            probs=weights,
            num_out_tokens=len(states) * self.config.moe_router_topk,
            fused=self.config.moe_permute_fusion,
        )
        projected = experts(sorted_states, routing_map.sum(dim=0), sorted_weights)
        restored = unpermute(
            projected,
            order,
            restore_shape=torch.Size((len(states), projected.shape[-1])),
            routing_map=routing_map,
            fused=self.config.moe_permute_fusion,
        )
        return restored.view(*tokens.shape[:-1], -1)

    def combine_postprocess(self, permutated_local_input_tokens: Tensor) -> Tensor:
        """Put the tokens back into their order: [S, B, 3 H]."""
        width = permutated_local_input_tokens.shape[-1]
        self.hidden_shape = (*self.hidden_shape[:-1], width)
        self.hidden_shape_before_permute = (self.hidden_shape_before_permute[0], width)
        return super().combine_postprocess(permutated_local_input_tokens)
