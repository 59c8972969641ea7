"""Linear layers and experts that multiply what FP8 or NVFP4 tensor cores would: emulated, on any device.

With input x, weight w and gradient g of the output, each rounded for the product it goes into (see
:mod:`rmoe_megatron.model.precision.rounding`):

    y = Q(x) Q(w)^T        over the input's features
    dx = Q(g) Q(w)         over the output's features
    dw = Q(g)^T Q(x)       over the tokens

Products are accumulated in float32, as on the tensor cores; y, dx and dw have the types of x, x and w. Rounding has no
gradient of its own. Layers have the names and layouts of Megatron-Core's: checkpoints are the same.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from rmoe_megatron.model.precision.rounding import DelayedScaling, Recipe, Rounding
from rmoe_megatron.model.recurrence.experts import Experts


def rounded_output(rounding: Rounding, tokens: Tensor, weight: Tensor) -> Tensor:
    """Return y, float32 [..., N, O], of tokens [..., N, K] and a weight [..., O, K]."""
    return rounding.inputs(tokens, -1) @ rounding.weights(weight, -1).mT


def rounded_input_gradient(rounding: Rounding, gradient: Tensor, weight: Tensor) -> Tensor:
    """Return dx, float32 [..., N, K], of the output's gradient [..., N, O]."""
    return rounding.gradients(gradient, -1) @ rounding.weights(weight, -2)


def rounded_weight_gradient(rounding: Rounding, gradient: Tensor, tokens: Tensor) -> Tensor:
    """Return dw, float32 [..., O, K]."""
    return rounding.gradients(gradient, -2).mT @ rounding.inputs(tokens, -2)


class RoundedProduct(torch.autograd.Function):
    """``x w^T`` of tokens [..., N, K] and a weight [..., O, K], both rounded; each of several has scales of its own."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, rounding: Rounding) -> Tensor:
        """Return [..., N, O] in the type of the tokens."""
        ctx.save_for_backward(tokens, weight)
        ctx.rounding = rounding
        return rounded_output(rounding, tokens, weight).to(tokens.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients of the tokens and of the weight where they are wanted."""
        (tokens, weight), gradient = ctx.saved_tensors, gradients[0]
        grad_tokens = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_tokens = rounded_input_gradient(ctx.rounding, gradient, weight).to(tokens.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = rounded_weight_gradient(ctx.rounding, gradient, tokens).to(weight.dtype)
        return grad_tokens, grad_weight, None


class _Rounded(nn.Module):
    """What both layers do instead of Megatron-Core's products, without tensor parallelism; each has a recipe of its own."""

    def __init__(
        self, *arguments: Any, recipe: Callable[[], Recipe | DelayedScaling], **settings: Any
    ) -> None:
        super().__init__(*arguments, **settings)
        self.recipe = recipe()

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> Tensor:
        tokens = input.flatten(0, -2)
        rounding = self.recipe.of_call(tokens, weight, trains=self.training and torch.is_grad_enabled())
        output = RoundedProduct.apply(tokens, weight, rounding).unflatten(0, input.shape[:-1])
        return output if bias is None else output + bias


class EmulatedColumnParallelLinear(_Rounded, ColumnParallelLinear):
    """Megatron-Core's ColumnParallelLinear with rounded operands."""


class EmulatedRowParallelLinear(_Rounded, RowParallelLinear):
    """Megatron-Core's RowParallelLinear with rounded operands."""


class EmulatedExperts(Experts):
    """The recurrence's experts with rounded operands: each expert's tokens and factors have scales of their own.

    Tokens are those of its dense block, whose gaps are zero and come last: a group that is padded to whole blocks.
    """

    def __init__(self, *arguments: Any, recipe: Recipe, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.multiply_with(partial(_rounded_product, recipe=recipe))


def _rounded_product(tokens: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
    return RoundedProduct.apply(tokens, weight, recipe)
