"""Adaptive layer normalisation (DiT's adaLN-Zero): shift, scale and gate vectors from the conditioning vector."""

import copy

import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.init import zeros_

from rmoe_megatron.model.precision.linear import ColumnParallelLinear
from rmoe_megatron.model.transformer_config import LAYER_NORM_EPS


class Modulation(MegatronModule):
    """A zero-initialised linear map of the conditioning vector to ``num_vectors`` vectors of the hidden size.

    Sharded over tensor-parallel ranks and gathered: in SD3 these layers are a third of all parameters. With sequence
    parallelism a rank modulates its own tokens, so that gradients of the gathered vectors are summed over the ranks.
    """

    def __init__(self, config: TransformerConfig, num_vectors: int) -> None:
        super().__init__(config=config)
        self.num_vectors = num_vectors
        whole_sequence = copy.copy(config)
        whole_sequence.sequence_parallel = False  # the conditioning vector has no sequence to split
        self.linear = ColumnParallelLinear(
            config.hidden_size,
            num_vectors * config.hidden_size,
            config=whole_sequence,
            init_method=zeros_,
            gather_output=False,
        )
        self.gather = (
            all_gather_last_dim_from_tensor_parallel_region if config.tensor_model_parallel_size > 1 else None
        )

    def forward(self, conditioning: Tensor) -> tuple[Tensor, ...]:
        """Map conditioning [1, B, H] (after SiLU) to ``num_vectors`` tensors [1, B, H]."""
        vectors = self.linear(conditioning)[0]
        return (self.gather(vectors) if self.gather else vectors).chunk(self.num_vectors, dim=-1)


def layer_norm(hidden_states: Tensor, eps: float = LAYER_NORM_EPS) -> Tensor:
    """Layer normalisation over the last dimension without affine parameters."""
    return F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=eps)


def modulate(hidden_states: Tensor, shift: Tensor, scale: Tensor, eps: float = LAYER_NORM_EPS) -> Tensor:
    """Return ``LN(hidden_states) * (1 + scale) + shift``; hidden_states [S, B, H], shift and scale [1, B, H]."""
    return shift.addcmul(layer_norm(hidden_states, eps), 1 + scale)
