"""Megatron-Core's tensor-parallel linear layers, as torch.compile can trace them."""

from typing import Any

from megatron.core.tensor_parallel import layers
from torch import Tensor

ColumnParallelLinear = layers.ColumnParallelLinear


class RowParallelLinear(layers.RowParallelLinear):
    """Megatron-Core's layer, which leaves its own group unsaid: looking for the default one cannot be traced."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        return super()._forward_impl(input, weight, *arguments, **settings | {"tp_group": self.tp_group})
