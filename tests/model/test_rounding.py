"""Rounding to eight and four bits against scalar arithmetic written from the formats' definitions, bit by bit."""

import math
from dataclasses import replace
from fractions import Fraction
from itertools import product

import pytest
import torch
from torch import Tensor

from rmoe_megatron.config.run import Fp8Recipe
from rmoe_megatron.model.precision.emulated_linear import RoundedProduct
from rmoe_megatron.model.precision.rounding import E2M1, E4M3, E5M2, NVFP4, RECIPES, DelayedScaling, Recipe
from tests.support.configurations import one_rank, tiny_config

# (exponent bits' bias, mantissa bits, largest number) of each format.
FORMATS = {"e4m3": (E4M3, 7, 3, 448.0), "e5m2": (E5M2, 15, 2, 57344.0), "e2m1": (E2M1, 1, 1, 6.0)}


def nearest(value: float, bias: int, mantissa_bits: int, largest: float) -> float:
    """The number of a format that is nearest to a value, ties to even; what is too large becomes the largest."""
    magnitude = Fraction(abs(value))
    if magnitude >= Fraction(largest):
        return math.copysign(largest, value)
    least = 1 - bias  # exponent of the smallest normal numbers, and of all subnormal ones
    exponent = max(least, math.frexp(float(magnitude))[1] - 1) if magnitude else least
    step = Fraction(2) ** (exponent - mantissa_bits)
    return math.copysign(float(round(magnitude / step) * step), value)  # round() of a Fraction: ties to even


@pytest.mark.parametrize("name", FORMATS)
def test_formats_round_to_nearest(name: str) -> None:
    format, bias, mantissa_bits, largest = FORMATS[name]
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4000, generator=generator) * torch.exp2(
        torch.randint(-20, 20, (4000,), generator=generator)
    )
    steps = torch.arange(-64, 65) / 16 * largest / 8  # many of them halfway between two numbers
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 0.0, -0.0, 2.0**-10, 3 * 2.0**-11])
    values = torch.cat((values, steps, ties, -ties))
    wanted = torch.tensor([nearest(value, bias, mantissa_bits, largest) for value in values.tolist()])
    assert torch.equal(format.round(values).view(torch.int32), wanted.view(torch.int32))
    assert len(wanted.unique()) > 14 if name == "e2m1" else len(wanted.unique()) > 90


def float32(value: Fraction | float) -> float:
    """A number rounded to float32."""
    return torch.tensor(float(value), dtype=torch.float64).float().item()


def block_scale(recipe: Fp8Recipe, amax: float, largest: float) -> float:
    """What the values of a block are multiplied by, from the definitions of the recipes."""
    if amax == 0:
        return 1.0
    if recipe is Fp8Recipe.tensorwise:
        return float32(largest / amax)
    if recipe is Fp8Recipe.blockwise:
        return 2.0 ** math.floor(math.log2(float32(largest / amax)))
    return 2.0 ** -math.ceil(math.log2(float32(amax * float32(1 / largest))))


@pytest.mark.parametrize("recipe", RECIPES)
def test_scales_are_those_of_the_definitions(recipe: Fp8Recipe) -> None:
    generator = torch.Generator().manual_seed(3)
    sizes = torch.exp2(torch.randint(-60, 60, (3000,), generator=generator))
    powers = torch.exp2(torch.arange(-60.0, 60.0))
    amax = torch.cat((torch.rand(3000, generator=generator) * sizes, powers, 448 * powers, torch.zeros(1)))
    wanted = torch.tensor([block_scale(recipe, value, 448.0) for value in amax.tolist()])
    assert torch.equal(RECIPES[recipe].scale(amax, 448.0), wanted)


def scalar_rounding(values: Tensor, recipe: Fp8Recipe, block: tuple[int, int], format: str) -> Tensor:
    """Round a matrix by loops over its blocks and values."""
    _, bias, mantissa_bits, largest = FORMATS[format]
    result = torch.empty_like(values)
    rows, columns = values.shape
    for top, left in product(range(0, rows, block[0]), range(0, columns, block[1])):
        place = slice(top, top + block[0]), slice(left, left + block[1])
        scale = block_scale(recipe, values[place].abs().max().item(), largest)
        inverse = float32(1 / scale)
        rounded = [
            float32(nearest(float32(value * scale), bias, mantissa_bits, largest) * inverse)
            for value in values[place].flatten().tolist()
        ]
        result[place] = torch.tensor(rounded).view_as(result[place])
    return result


def matrix(rows: int = 150, columns: int = 200) -> Tensor:
    """Values of many sizes, with a block of zeros, a huge value and tiny ones."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.exp2(torch.randint(-12, 6, (rows, 1), generator=generator))
    values = torch.randn(rows, columns, generator=generator) * sizes
    values[:128, :128] = 0
    values[-10, -10], values[3] = 3.0e4, values[3] * 1e-20
    return values


@pytest.mark.parametrize("along", [-1, -2])
@pytest.mark.parametrize(
    ("recipe", "role", "format", "blocks"),
    [
        (Fp8Recipe.tensorwise, "inputs", "e4m3", [(150, 200), (150, 200)]),
        (Fp8Recipe.tensorwise, "weights", "e4m3", [(150, 200), (150, 200)]),
        (Fp8Recipe.tensorwise, "gradients", "e5m2", [(150, 200), (150, 200)]),
        (Fp8Recipe.blockwise, "inputs", "e4m3", [(1, 128), (128, 1)]),
        (Fp8Recipe.blockwise, "weights", "e4m3", [(128, 128), (128, 128)]),
        (Fp8Recipe.blockwise, "gradients", "e4m3", [(1, 128), (128, 1)]),
        (Fp8Recipe.mxfp8, "inputs", "e4m3", [(1, 32), (32, 1)]),
        (Fp8Recipe.mxfp8, "weights", "e4m3", [(1, 32), (32, 1)]),
        (Fp8Recipe.mxfp8, "gradients", "e4m3", [(1, 32), (32, 1)]),
    ],
)
def test_recipes_round_as_their_definitions_do(
    recipe: Fp8Recipe, role: str, format: str, blocks: list[tuple[int, int]], along: int
) -> None:
    values = matrix()
    found = getattr(RECIPES[recipe], role)(values, along)
    wanted = scalar_rounding(values, recipe, blocks[0 if along == -1 else 1], format)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, values)


@pytest.mark.parametrize(
    ("role", "block"), [("inputs", (1, 16)), ("weights", (16, 16)), ("gradients", (1, 16))]
)
def test_nvfp4_rounds_as_its_definition_does(role: str, block: tuple[int, int]) -> None:
    values = matrix(40, 50)
    values[:16, :16] = 0
    rows, columns = values.shape
    whole = float32(448 * 6 / values.abs().max().item())
    wanted = torch.empty_like(values)
    for top, left in product(range(0, rows, block[0]), range(0, columns, block[1])):
        place = slice(top, top + block[0]), slice(left, left + block[1])
        amax = values[place].abs().max().item()
        decoded = nearest(float32(float32(amax * whole) / 6), 7, 3, 448.0)
        scale = float32(whole / decoded) if decoded else 0.0
        rounded = [
            float32(float32(nearest(float32(value * scale), 1, 1, 6.0) * decoded) / whole)
            for value in values[place].flatten().tolist()
        ]
        wanted[place] = torch.tensor(rounded).view_as(wanted[place])
    assert torch.equal(getattr(NVFP4, role)(values, -1), wanted)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_tensorwise_is_the_cast_of_pytorch(dtype: torch.dtype) -> None:
    """Where nothing saturates, rounding is PyTorch's cast there and back."""
    values = matrix()
    scale = torch.finfo(dtype).max / values.abs().max()
    recipe = RECIPES[Fp8Recipe.tensorwise]
    found = recipe.inputs(values, -1) if dtype == torch.float8_e4m3fn else recipe.gradients(values, -1)
    assert torch.equal(found, (values * scale).to(dtype).float() * scale.reciprocal())


def test_delayed_scales_are_those_of_the_calls_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of a growing, then shrinking operand, in a history of three; what evaluates leaves no trace."""
    monkeypatch.setattr(DelayedScaling, "LENGTH", 3)
    config = tiny_config()
    with one_rank(config):
        recipe = DelayedScaling()
        seen: list[float] = []
        for amax in (3.0, 5.0, 7.0, 2.0, 1.0, 0.5, 0.25):
            tokens, weight, gradient = (torch.tensor([[amax, 0.1, -0.03]]) * size for size in (1, 2, 2**-10))
            rounding = recipe.of_call(tokens, weight, trains=True)
            recipe.of_call(100 * tokens, weight, trains=False)
            largest = max(seen[-3:], default=0)
            for operand, size, format, limit in (
                ("inputs", 1, "e4m3", 448.0), ("weights", 2, "e4m3", 448.0), ("gradients", 2**-10, "e5m2", 57344.0),
            ):  # fmt: skip
                values = {"inputs": tokens, "weights": weight, "gradients": gradient}[operand]
                scale = float32(limit / float32(largest * size)) if largest else 1.0
                _, bias, mantissa_bits, _ = FORMATS[format]
                wanted = [
                    float32(nearest(float32(value * scale), bias, mantissa_bits, limit) * float32(1 / scale))
                    for value in values.flatten().tolist()
                ]
                for along in (-1, -2):
                    assert getattr(rounding, operand)(values, along).flatten().tolist() == wanted
            seen.append(amax)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_delayed_scale_outlives_what_is_not_finite(bad: float) -> None:
    """Transformer Engine keeps the last scale; what is saved of the history is finite."""
    with one_rank(tiny_config()):
        recipe = DelayedScaling()
        values = torch.tensor([[1.0, 3.5], [-7.0, 0.25]])
        spoilt = torch.tensor([[1.0, bad], [-70.0, 0.25]])
        for tensor in (values, spoilt):
            recipe.of_call(tensor, tensor, trains=True).gradients(tensor, -1)
        rounding = recipe.of_call(values, values, trains=True)
        assert rounding.input_scale == rounding.weight_scale == 448 / 7
        assert rounding.gradient_scale(values) == 57344 / 7
        assert recipe.amax_history.isfinite().all()
        larger = 2 * values
        recipe.of_call(larger, larger, trains=True)
        assert recipe.of_call(values, values, trains=True).input_scale == 448 / 14


@pytest.mark.parametrize("recipe", [*RECIPES.values(), NVFP4])
def test_a_product_multiplies_rounded_operands(recipe: Recipe) -> None:
    """Each of the three products has both operands rounded along what it adds up; sums are those of float64."""
    generator = torch.Generator().manual_seed(2)
    tokens, weight, gradient = (
        torch.randn(size, generator=generator) for size in ((40, 64), (48, 64), (40, 48))
    )
    tokens.requires_grad_()
    weight.requires_grad_()
    output = RoundedProduct.apply(tokens, weight, recipe)
    output.backward(gradient)
    x, w = tokens.detach(), weight.detach()
    products = [
        (output, recipe.inputs(x, -1), recipe.weights(w, -1).t()),
        (tokens.grad, recipe.gradients(gradient, -1), recipe.weights(w, -2)),
        (weight.grad, recipe.gradients(gradient, -2).t(), recipe.inputs(x, -2)),
    ]
    for found, left, right in products:
        assert found is not None
        exact = left.double() @ right.double()
        assert (found - exact).norm() < 1e-6 * exact.norm()
    exact = x.double() @ w.double().t()
    assert 1e-3 < (output - exact).norm() / exact.norm() < (0.2 if recipe is NVFP4 else 0.05)


def test_frozen_weights_get_no_gradient() -> None:
    tokens, weight = torch.randn(8, 32, requires_grad=True), torch.randn(16, 32)
    RoundedProduct.apply(tokens, weight, replace(NVFP4)).sum().backward()
    assert tokens.grad is not None
    assert weight.grad is None
