"""Token dispatch of the recurrence: Megatron-Core's all-to-all, with Q, K and V coming back for every token."""

from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor


class QueryKeyValueDispatcher(MoEAlltoAllTokenDispatcher):
    """The all-to-all dispatcher for experts that return 3 H values for a token of H.

    Megatron-Core restores the shape of what was sent; here the last dimension is that of what comes back.
    """

    hidden_shape: tuple[int, ...]
    hidden_shape_before_permute: tuple[int, ...]

    def combine_postprocess(self, permutated_local_input_tokens: Tensor) -> Tensor:
        """Put the tokens back into their order: [S, B, 3 H]."""
        width = permutated_local_input_tokens.shape[-1]
        self.hidden_shape = (*self.hidden_shape[:-1], width)
        self.hidden_shape_before_permute = (self.hidden_shape_before_permute[0], width)
        return super().combine_postprocess(permutated_local_input_tokens)
