"""Rounding of matrix-product operands to eight and four bits as Transformer Engine's recipes do it, in ordinary arithmetic.

A block of values shares a scale. Values are multiplied by it, rounded to the format, and divided by it again: what comes
back is what a tensor core would multiply. Facts of the recipes are those of Transformer Engine 2 (transformer_engine.common.recipe
and the scale computations of its quantisation kernels); nothing of it is needed to run this.

=========== ================================= =================== ==========================================
recipe      block of inputs and gradients     block of weights    scale
=========== ================================= =================== ==========================================
tensorwise  the tensor                        the tensor          largest of the format / amax
delayed     the tensor                        the tensor          the same of the largest of its last 1024 amaxes
blockwise   1 x 128 along the product         128 x 128           the same, rounded down to a power of two
mxfp8       1 x 32 along the product          1 x 32              a power of two (E8M0), so that nothing saturates
nvfp4       1 x 16 along the product          16 x 16             E4M3 a block, on top of one a tensor
=========== ================================= =================== ==========================================

NVFP4's random Hadamard transforms and stochastic rounding of gradients are not here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor, nn

from rmoe_megatron.config.run import Fp8Recipe, Precision, RunConfig


@dataclass(frozen=True)
class Format:
    """A floating-point format: how a float32 tensor is rounded to it, and its largest number."""

    round: Callable[[Tensor], Tensor]
    largest: float


def _eight_bits(dtype: torch.dtype) -> Format:
    largest = torch.finfo(dtype).max
    # PyTorch's cast makes NaN (E4M3) or infinity (E5M2) of what is too large; the hardware's saturates.
    return Format(lambda values: values.clamp(-largest, largest).to(dtype).float(), largest)


def _round_e2m1(values: Tensor) -> Tensor:
    """Round to 0, 0.5, 1, 1.5, 2, 3, 4 or 6 with the sign of each value, ties to the even mantissa."""
    magnitude = values.abs().clamp(max=6.0)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign((magnitude / step).round() * step, values)


E4M3 = _eight_bits(torch.float8_e4m3fn)
E5M2 = _eight_bits(torch.float8_e5m2)
E2M1 = Format(_round_e2m1, 6.0)


def tensor_scale(amax: Tensor, largest: float) -> Tensor:
    """Return ``largest / amax``; 1 where there is nothing to scale, the largest float32 where the quotient is infinite."""
    # Of two tensors: PyTorch divides a number by a tensor, or on a GPU a tensor by a number, through the reciprocal.
    scale = (torch.full_like(amax, largest) / amax).clamp(max=torch.finfo(torch.float32).max)
    return torch.where((amax > 0) & amax.isfinite(), scale, 1.0)


def power_of_two_scale(amax: Tensor, largest: float) -> Tensor:
    """Return :func:`tensor_scale` rounded down to a power of two."""
    mantissa, exponent = torch.frexp(tensor_scale(amax, largest))
    return torch.ldexp(torch.full_like(mantissa, 0.5), exponent)


def mx_scale(amax: Tensor, largest: float) -> Tensor:
    """Return the inverse of the least power of two that is not below ``amax / largest`` (E8M0: exponents of 8 bits)."""
    wanted = amax * torch.tensor(1 / largest)
    mantissa, exponent = torch.frexp(wanted)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-127, 127)
    return torch.where(amax > 0, torch.ldexp(torch.ones_like(wanted), -exponent), 1.0)


class Rounding(Protocol):
    """How operands of a linear layer's matrix products are rounded, for products over dimension ``along`` (-1 or -2)."""

    def inputs(self, values: Tensor, along: int) -> Tensor:
        """Round the layer's inputs [..., N, K]; returns float32 of this shape."""

    def weights(self, values: Tensor, along: int) -> Tensor:
        """Round its weight [..., O, K] likewise."""

    def gradients(self, values: Tensor, along: int) -> Tensor:
        """Round the gradients of its outputs [..., N, O] likewise."""


@dataclass(frozen=True)
class Recipe:
    """A :class:`Rounding` whose scales follow from the operand.

    Attributes:
        forward: format of inputs and weights.
        backward: format of the output's gradients.
        scale: computes a block's scale from its amax and the largest number of the format.
        length: values along the product that share a scale; None is the whole tensor.
        square_weights: a weight's block has this length both ways, so that its transpose has the same scales.
        per_tensor: a scale of the whole tensor comes first, and a block's is rounded to E4M3 (NVFP4).
    """

    forward: Format
    backward: Format
    scale: Callable[[Tensor, float], Tensor]
    length: int | None = None
    square_weights: bool = False
    per_tensor: bool = False

    def inputs(self, values: Tensor, along: int) -> Tensor:
        """Round inputs; see :class:`Rounding`."""
        return self._round(values, self.forward, self._block(along))

    def gradients(self, values: Tensor, along: int) -> Tensor:
        """Round gradients."""
        return self._round(values, self.backward, self._block(along))

    def weights(self, values: Tensor, along: int) -> Tensor:
        """Round weights."""
        length = self.length or 0
        return self._round(
            values, self.forward, (length, length) if self.square_weights else self._block(along)
        )

    def of_call(self, tokens: Tensor, weight: Tensor, trains: bool) -> Rounding:
        """Return how one call of a layer rounds: there is nothing to remember."""
        return self

    def _block(self, along: int) -> tuple[int, int]:
        length = self.length or 0
        return (1, length) if along == -1 else (length, 1)

    def _round(self, values: Tensor, format: Format, block: tuple[int, int]) -> Tensor:
        """Return float32 of the same shape, rounded by blocks of the last two dimensions; (_, 0) is all of these."""
        values = values.float()
        if values.numel() == 0:  # a rank's modules may get no token
            return values
        rows, columns = values.shape[-2:]
        height, width = block if self.length else (rows, columns)
        padded = F.pad(values, (0, -columns % width, 0, -rows % height))
        blocks = padded.unflatten(-1, (-1, width)).unflatten(
            -3, (-1, height)
        )  # [..., rows, height, columns, width]
        amax = blocks.abs().amax(dim=(-3, -1), keepdim=True)
        if self.per_tensor:
            whole = tensor_scale(values.abs().amax(dim=(-2, -1)), E4M3.largest * format.largest)
            whole = whole[..., None, None, None, None]
            decoded = amax * whole / torch.full_like(amax, format.largest)
            decoded = E4M3.round(decoded)  # what a block is divided by, in eight bits
            scale = torch.where(decoded > 0, whole / decoded, 0.0)
            rounded = format.round(blocks * scale) * decoded / whole
        else:
            scale = self.scale(amax, format.largest)
            rounded = format.round(blocks * scale) * scale.reciprocal()
        return rounded.flatten(-4, -3).flatten(-2)[..., :rows, :columns]


@dataclass(frozen=True)
class TensorScales:
    """A :class:`Rounding` of whole tensors with scales that are given; a gradient's is asked for when it is there."""

    input_scale: Tensor
    weight_scale: Tensor
    gradient_scale: Callable[[Tensor], Tensor]

    def inputs(self, values: Tensor, along: int) -> Tensor:
        """Round inputs."""
        return E4M3.round(values.float() * self.input_scale) * self.input_scale.reciprocal()

    def weights(self, values: Tensor, along: int) -> Tensor:
        """Round weights."""
        return E4M3.round(values.float() * self.weight_scale) * self.weight_scale.reciprocal()

    def gradients(self, values: Tensor, along: int) -> Tensor:
        """Round gradients."""
        scale = self.gradient_scale(values)
        return E5M2.round(values.float() * scale) * scale.reciprocal()


class DelayedScaling(nn.Module):
    """Scales of a layer's operands from their past (Transformer Engine's recipe of this name), 1 as long as there is none.

    What is not finite is not remembered: the scale stays as it was, as Transformer Engine's does.
    Every rank of a pipeline stage has the same history: amaxes are the largest of all its data- and context-parallel ranks.

    Attributes:
        amax_history: float32 [3, LENGTH], of inputs, weights and gradients, newest first; part of a run's training state.
    """

    LENGTH = 1024
    INPUT, WEIGHT, GRADIENT = range(3)
    amax_history: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("amax_history", torch.zeros(3, self.LENGTH), persistent=False)

    def of_call(self, tokens: Tensor, weight: Tensor, trains: bool) -> TensorScales:
        """Return how one call of the layer rounds; what trains is remembered, and scales the calls after it."""
        scales = (self._scale(self.INPUT, E4M3), self._scale(self.WEIGHT, E4M3))
        if trains:
            self._remember(self.INPUT, tokens)
            self._remember(self.WEIGHT, weight)
        gradient_scale = list[Tensor]()

        def scale_gradient(gradient: Tensor) -> Tensor:
            if not gradient_scale:  # both of its products take the same
                gradient_scale.append(self._scale(self.GRADIENT, E5M2))
                self._remember(self.GRADIENT, gradient)
            return gradient_scale[0]

        return TensorScales(*scales, scale_gradient)

    def _scale(self, operand: int, format: Format) -> Tensor:
        return tensor_scale(self.amax_history[operand].max(), format.largest)

    def _remember(self, operand: int, values: Tensor) -> None:
        amax = values.detach().abs().amax().float()
        # The largest of several ranks may miss a NaN, but no infinity.
        amax = torch.where(amax.isfinite(), amax, torch.inf)
        group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
        if group.size() > 1:
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
        known = self.amax_history[operand]
        history = known.roll(1)
        history[0] = amax
        self.amax_history[operand] = torch.where(amax.isfinite(), history, known)


RECIPES = {
    Fp8Recipe.tensorwise: Recipe(E4M3, E5M2, tensor_scale),
    Fp8Recipe.blockwise: Recipe(E4M3, E4M3, power_of_two_scale, length=128, square_weights=True),
    Fp8Recipe.mxfp8: Recipe(E4M3, E4M3, mx_scale, length=32),
}
NVFP4 = Recipe(E2M1, E2M1, tensor_scale, length=16, square_weights=True, per_tensor=True)


def make_recipe(config: RunConfig) -> Recipe | DelayedScaling:
    """Return the recipe of a layer of a run whose precision is emulated."""
    if config.precision is Precision.nvfp4_emulated:
        return NVFP4
    return DelayedScaling() if config.fp8.recipe is Fp8Recipe.delayed else RECIPES[config.fp8.recipe]
