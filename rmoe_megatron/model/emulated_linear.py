"""Linear layers that multiply what FP8 or NVFP4 tensor cores would: emulated, on any device.

With input x, weight w and gradient g of the output, each rounded for the product it goes into (see
:mod:`rmoe_megatron.model.quantization`):

    y = Q(x) Q(w)^T        over the input's features
    dx = Q(g) Q(w)         over the output's features
    dw = Q(g)^T Q(x)       over the tokens

Products are accumulated in float32, as on the tensor cores; y, dx and dw have the types of x, x and w. Rounding has no
gradient of its own. Layers have the names and layouts of Megatron-Core's: checkpoints are the same.
"""

from typing import Any

import torch
from torch import Tensor

from rmoe_megatron.model.linear import ColumnParallelLinear, RowParallelLinear
from rmoe_megatron.model.quantization import Recipe


def rounded_output(recipe: Recipe, tokens: Tensor, weight: Tensor) -> Tensor:
    """Return y, float32 [N, O], of tokens [N, K] and a weight [O, K]."""
    return recipe.inputs(tokens, -1) @ recipe.weights(weight, -1).t()


def rounded_input_gradient(recipe: Recipe, gradient: Tensor, weight: Tensor) -> Tensor:
    """Return dx, float32 [N, K], of the output's gradient [N, O]."""
    return recipe.gradients(gradient, -1) @ recipe.weights(weight, -2)


def rounded_weight_gradient(recipe: Recipe, gradient: Tensor, tokens: Tensor) -> Tensor:
    """Return dw, float32 [O, K]."""
    return recipe.gradients(gradient, -2).t() @ recipe.inputs(tokens, -2)


class RoundedProduct(torch.autograd.Function):
    """``x w^T`` of tokens [N, K] and a weight [O, K], both rounded."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
        """Return [N, O] in the type of the tokens."""
        ctx.save_for_backward(tokens, weight)
        ctx.recipe = recipe
        return rounded_output(recipe, tokens, weight).to(tokens.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients of the tokens and of the weight where they are wanted."""
        (tokens, weight), recipe, gradient = ctx.saved_tensors, ctx.recipe, gradients[0]
        grad_tokens = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_tokens = rounded_input_gradient(recipe, gradient, weight).to(tokens.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = rounded_weight_gradient(recipe, gradient, tokens).to(weight.dtype)
        return grad_tokens, grad_weight, None


def _rounded_linear(recipe: Recipe, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return what a linear layer makes of [S, B, K]."""
    output = RoundedProduct.apply(input.flatten(0, -2), weight, recipe).unflatten(0, input.shape[:-1])
    return output if bias is None else output + bias


class EmulatedColumnParallelLinear(ColumnParallelLinear):
    """Megatron-Core's ColumnParallelLinear with rounded operands, without tensor parallelism."""

    def __init__(self, *arguments: Any, recipe: Recipe, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.recipe = recipe

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> Tensor:
        return _rounded_linear(self.recipe, input, weight, bias)


class EmulatedRowParallelLinear(RowParallelLinear):
    """Megatron-Core's RowParallelLinear with rounded operands, without tensor parallelism."""

    def __init__(self, *arguments: Any, recipe: Recipe, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.recipe = recipe

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> Tensor:
        return _rounded_linear(self.recipe, input, weight, bias)
