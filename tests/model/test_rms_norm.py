"""RMSNorm against its formula in float64, on a CPU as it runs eagerly and as PyTorch's compiler sees it."""

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch

from rmoe_megatron.model.rms_norm import rms_norm

EPS = 1e-6


def reference(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return values / (values.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight


def inputs(
    dtype: torch.dtype, weight_shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values as attention has them, a part of a wider tensor; a weight; and a gradient that is laid out otherwise."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(7, 3, 2, 3, 16, generator=generator) * torch.logspace(-3, 1, 7).view(7, 1, 1, 1, 1)
    values = (
        wide.to(dtype)[..., : weight_shape[0], :] if len(weight_shape) == 2 else wide.to(dtype)[..., 0, :]
    )
    gradient = (
        torch.randn(*reversed(values.shape), generator=generator)
        .to(dtype)
        .permute(*reversed(range(values.dim())))
    )
    weight = 1 + torch.randn(weight_shape, generator=generator)
    return values.requires_grad_(), weight.to(dtype).requires_grad_(), gradient


def traced(values: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The other branch, which the compiler takes."""
    with patch.object(torch.compiler, "is_compiling", return_value=True):
        return rms_norm(values, weight, eps)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("weight_shape", [(16,), (2, 16)])
@pytest.mark.parametrize("norm", [rms_norm, traced])
def test_it_is_the_formula(
    norm: Callable[..., torch.Tensor], weight_shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    values, weight, gradient = inputs(dtype, weight_shape)
    exact = [part.detach().double().requires_grad_() for part in (values, weight)]
    expected = reference(*exact)
    output = norm(values, weight, EPS)
    assert output.dtype is dtype
    assert (output - expected).norm() < tolerance * expected.norm()
    found = torch.autograd.grad(output, (values, weight), gradient)
    gradients = torch.autograd.grad(expected, exact, gradient.double())
    for mine, exactly in zip(found, gradients, strict=True):
        assert mine.dtype is dtype
        assert (mine - exactly).norm() < tolerance * exactly.norm()


def test_it_leaves_its_input_alone() -> None:
    values, weight, _ = inputs(torch.float32, (16,))
    before = values.detach().clone()
    rms_norm(values, weight, EPS)
    assert torch.equal(values, before)
