"""Megatron-Core's tensor-parallel linear layers, as torch.compile can trace them; on one rank plain ones.

Without tensor parallelism nothing is left to be done around the product, and PyTorch adds the bias in its kernel. Megatron-Core's
MLP asks for the bias back to add it itself, which would pass over the activations once more; it takes none for an answer.
"""

from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel import layers
from torch import Tensor


class ColumnParallelLinear(layers.ColumnParallelLinear):
    """A rank has rows of the weight."""

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the product with the bias added, or both apart as Megatron-Core's layer does."""
        if self.config.tensor_model_parallel_size == 1:
            return F.linear(input_, self.weight if weight is None else weight, self.bias), None
        return super().forward(input_, weight, runtime_gather_output)


class RowParallelLinear(layers.RowParallelLinear):
    """A rank has columns of the weight."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the product with the bias added, or both apart as Megatron-Core's layer does."""
        if self.config.tensor_model_parallel_size == 1:
            return F.linear(input_, self.weight, self.bias), None
        return super().forward(input_)

    def _forward_impl(self, input: Tensor, weight: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        # Megatron-Core would look for the default group, which the compiler cannot trace.
        return super()._forward_impl(input, weight, *arguments, **settings | {"tp_group": self.tp_group})
