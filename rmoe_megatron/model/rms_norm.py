"""RMSNorm over the last dimension, with a weight that may have further dimensions before it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(values: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``values / sqrt(mean(values^2) + eps) * weight``, the mean over the last dimension, worked out in float32.

    PyTorch has one kernel for it on a GPU, and its compiler makes one. On a CPU it takes a dozen, forward and backward; those of
    :class:`_RmsNormOnCpu` are fewer: 1.3 to 1.8 times as fast for 200,000 to 3,000,000 values in bf16 and fp32.

    Args:
        values: [..., *weight.shape] of any data type.
    """
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        return _RmsNormOnCpu.apply(values, weight, eps)
    return F.rms_norm(values, weight.shape[-1:], None, eps) * weight


class _RmsNormOnCpu(torch.autograd.Function):
    """With n the normalised values and s = 1 / sqrt(mean(x^2) + eps): y = n w, and dx = s (g w - n mean(g w n))."""

    @staticmethod
    def forward(context: Any, values: Tensor, weight: Tensor, eps: float) -> Tensor:
        exact = values.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        length = exact.shape[-1]
        squared = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_()
        scale = squared.div_(length).add_(eps).rsqrt_()
        normalised = exact.mul_(scale)
        context.save_for_backward(normalised, scale, weight)
        return (normalised * weight.float()).to(values.dtype)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        normalised, scale, weight = context.saved_tensors
        gradient = gradients[0].to(torch.float32, memory_format=torch.contiguous_format)
        products = gradient * normalised
        of_weight = products.sum(dim=tuple(range(products.dim() - weight.dim())))
        mean = products.mul_(weight.float()).mean(dim=-1, keepdim=True)
        of_values = torch.addcmul(gradient * weight.float(), normalised, mean, value=-1).mul_(scale)
        return of_values.to(gradients[0].dtype), of_weight.to(weight.dtype), None
