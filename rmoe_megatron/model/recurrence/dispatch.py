"""Token dispatch of the recurrence: Megatron-Core's all-to-all, with Q, K and V coming back for every token."""

from collections.abc import Callable

from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor


class QueryKeyValueDispatcher(MoEAlltoAllTokenDispatcher):
    """The all-to-all dispatcher for experts that return 3 H values for a token of H.

    Megatron-Core restores the shape of what was sent; here the last dimension is that of what comes back.
    """

    hidden_shape: tuple[int, ...]
    hidden_shape_before_permute: tuple[int, ...]

    def apply(
        self,
        experts: Callable[[Tensor, Tensor, Tensor], Tensor],
        tokens: Tensor,
        routing_map: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Send every token to the rank of its module, apply the module there, and bring the result back.

        Args:
            experts: takes tokens sorted by module, their number by module and their weights; see ``Experts``.
            tokens: this rank's, [S, B, H].
            routing_map: bool [S * B, M], where a token goes.
            weights: float32 [S * B, M], with which weight.

        Returns:
            [S, B, 3 H] in the order of ``tokens``.
        """
        sent, sent_weights = self.token_dispatch(*self.dispatch_preprocess(tokens, routing_map, weights))
        received, tokens_per_expert, received_weights = self.dispatch_postprocess(sent, sent_weights)
        projected = experts(received, tokens_per_expert, received_weights)
        return self.combine_postprocess(self.token_combine(self.combine_preprocess(projected)))

    def combine_postprocess(self, permutated_local_input_tokens: Tensor) -> Tensor:
        """Put the tokens back into their order: [S, B, 3 H]."""
        width = permutated_local_input_tokens.shape[-1]
        self.hidden_shape = (*self.hidden_shape[:-1], width)
        self.hidden_shape_before_permute = (self.hidden_shape_before_permute[0], width)
        return super().combine_postprocess(permutated_local_input_tokens)
