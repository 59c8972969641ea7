"""Watches the matrix products of a model's blocks, and measures what each loses under every recipe.

A product is one of tokens x [..., N, K] and a weight w [..., O, K], which training takes three times: output, gradient of the
input, gradient of the weight. Operands of these are rounded as in :mod:`rmoe_megatron.model.precision.emulated_linear`; the model itself
goes on with the exact output.
"""

from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from rmoe_megatron.config.run import Fp8Recipe
from rmoe_megatron.model.block import Block
from rmoe_megatron.model.precision.emulated_linear import (
    rounded_input_gradient,
    rounded_output,
    rounded_weight_gradient,
)
from rmoe_megatron.model.precision.layers import LOCAL
from rmoe_megatron.model.precision.rounding import NVFP4, RECIPES, DelayedScaling, Recipe, Rounding
from rmoe_megatron.model.recurrence.experts import Experts, grouped_product

SCALED_BY_OPERAND: dict[str, Recipe] = {recipe.value: RECIPES[recipe] for recipe in RECIPES} | {
    "nvfp4": NVFP4
}
DELAYED = Fp8Recipe.delayed.value
ALL_RECIPES = (DELAYED, *SCALED_BY_OPERAND)


class WatchedProduct:
    """A product of a model: under each recipe, how far from the exact ones are the three that training takes.

    Attributes:
        measures: otherwise only histories grow, which delayed scaling takes its scales from.
        errors: ``|rounded - exact| / |exact|`` of output, input gradient and weight gradient, by recipe and call.

    Args:
        delayed: a history for delayed scaling; None for what that recipe leaves as it is.
    """

    def __init__(self, delayed: DelayedScaling | None) -> None:
        self.recipes: dict[str, Recipe | DelayedScaling] = dict(SCALED_BY_OPERAND)
        if delayed is not None:
            self.recipes[DELAYED] = delayed
        self.measures = False
        self.errors: dict[str, list[tuple[float, ...]]] = {name: [] for name in self.recipes}

    def watch(self, tokens: Tensor, weight: Tensor, output: Tensor) -> None:
        """Watch a call: tokens [..., N, K], weight [..., O, K], output [..., O] of as many tokens, whose gradient is waited for."""
        if not output.requires_grad:
            return
        tokens, weight = tokens.detach(), weight.detach()
        # Now, as in training: the scales of a call are those of the calls before it.
        roundings = {
            name: recipe.of_call(tokens, weight, trains=True) for name, recipe in self.recipes.items()
        }
        output.register_hook(
            lambda gradient: self._measure(
                roundings, tokens, weight, gradient.reshape(*tokens.shape[:-1], -1)
            )
        )

    def mean_errors(self) -> dict[str, tuple[float, ...]]:
        """Return the errors of each recipe that something was measured of, averaged over calls."""
        return {
            name: tuple(fmean(values) for values in zip(*found, strict=True))
            for name, found in self.errors.items()
            if found
        }

    def _measure(
        self, roundings: dict[str, Rounding], tokens: Tensor, weight: Tensor, gradient: Tensor
    ) -> None:
        if not self.measures:
            if DELAYED in roundings:
                roundings[DELAYED].gradients(gradient, -1)  # which the history takes note of
            return
        exact = (tokens @ weight.mT, gradient @ weight, gradient.mT @ tokens)
        for name, rounding in roundings.items():
            rounded = products(rounding, tokens, weight, gradient)
            self.errors[name].append(tuple(map(_relative_error, rounded, exact)))


def products(
    rounding: Rounding, tokens: Tensor, weight: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, input gradient and weight gradient from rounded operands [..., N, K], [..., O, K] and [..., N, O]."""
    return (
        rounded_output(rounding, tokens, weight),
        rounded_input_gradient(rounding, gradient, weight),
        rounded_weight_gradient(rounding, gradient, tokens),
    )


def watch_products(model: nn.Module) -> dict[tuple[int, str], WatchedProduct]:
    """Watch what low precision rounds in a model's blocks; returns it by number of the block, from 0, and name of the layer.

    Linear layers, but not modulations; of a recurrence each factor of its experts, all of them and all latent steps as one.
    """
    watched = {}
    for block in (module for module in model.modules() if isinstance(module, Block)):
        for name, module in block.named_modules():
            found = {}
            if isinstance(module, Experts):
                found = watch_experts(module)
            elif _is_rounded(name, module):
                found = {"": _watch_layer(module)}
            for factor, product in found.items():
                watched[block.layer_number - 1, f"{name}.{factor}".rstrip(".")] = product
    return watched


def watch_experts(experts: Experts) -> dict[str, WatchedProduct]:
    """Watch the products of a recurrence's experts, by name of the factor; delayed scaling leaves experts as they are."""
    watched = {name: WatchedProduct(delayed=None) for name, _ in experts.named_parameters()}

    def product(tokens: Tensor, weight: Tensor) -> Tensor:
        output = grouped_product(tokens, weight)
        # What is multiplied by is a factor, or a view of one.
        name = next(
            name for name, factor in experts.named_parameters() if factor.data_ptr() == weight.data_ptr()
        )
        watched[name].watch(tokens, weight, output)
        return output

    experts.multiply_with(product)
    return watched


def _is_rounded(name: str, module: nn.Module) -> bool:
    kinds = (LOCAL.column_parallel_linear, LOCAL.row_parallel_linear)
    return isinstance(module, kinds) and "modulation" not in name  # type: ignore[arg-type]


def _watch_layer(layer: Any) -> WatchedProduct:
    product = WatchedProduct(DelayedScaling().to(layer.weight.device))
    layer.register_forward_hook(partial(_watch_call, product))
    return product


def _watch_call(
    product: WatchedProduct, layer: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor | None]
) -> None:
    product.watch(inputs[0].flatten(0, -2), layer.weight, outputs[0])


def _relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm().clamp_min(torch.finfo(exact.dtype).tiny)).item()
