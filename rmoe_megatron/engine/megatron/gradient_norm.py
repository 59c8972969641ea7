"""The norm of all gradients and clipping by it, in a few kernels and without the host waiting for a number.

Megatron-Core's own, without Transformer Engine or Apex, reads one number per parameter, and its ``step`` works the norm
out again that a trainer has looked at already. Which gradients count, and over which ranks, is Megatron-Core's to say.
"""

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor
from torch.distributed import ProcessGroup


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer) -> Tensor:
    """Return the norm of the whole model's gradients, a float32 scalar on the device, the same on every rank.

    The optimizer's gradients are prepared (``prepare_grads``). Each of its parts (dense parameters, modules) says which of
    its gradients this rank counts, so that none counts twice, and over which ranks they are to be summed. A collective.
    """
    squares: dict[ProcessGroup, Tensor] = {}
    for part in parts(optimizer):
        group = part.get_grad_stats_parallel_group()
        square = _squared_norm(part.get_grads_for_grad_norm())
        squares[group] = squares[group] + square if group in squares else square
    for group, square in squares.items():
        torch.distributed.all_reduce(square, group=group)
    return torch.stack(list(squares.values())).sum().sqrt()


@torch.no_grad()
def clip_gradients(optimizer: MegatronOptimizer, max_norm: float, norm: float) -> None:
    """Scale all gradients down to a norm of ``max_norm`` if their ``norm`` is larger; 0 leaves them alone."""
    if max_norm == 0 or norm <= max_norm:
        return
    for part in parts(optimizer):
        gradients = [each.grad for each in part.get_parameters() if each.grad is not None]
        if gradients:
            # The small number is PyTorch's, and Megatron-Core's.
            torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))


def parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Return the optimizers that are chained, or the one that is not."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _squared_norm(gradients: list[Tensor]) -> Tensor:
    norm = torch.nn.utils.get_total_norm(gradients)  # float32 gradients; of none it is a zero on the CPU
    return norm.to(torch.cuda.current_device() if not gradients else norm.device).square()
