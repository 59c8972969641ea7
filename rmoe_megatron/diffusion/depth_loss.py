"""The loss of a model whose output is decoded after several depths: deep supervision, and self-distillation of drawn depths."""

from collections.abc import Callable

from torch import Tensor

from rmoe_megatron.config.model import DepthLoss, DiffusionConfig


def depth_loss(config: DiffusionConfig, outputs: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the loss of outputs float32 [D, B, C, H, W], shallowest first, a float32 scalar.

    ``every``: the loss of the deepest plus the mean of the others' (Looped-DiT, arXiv 2609.40305).
    ``drawn``: the loss of the deepest, plus ``1 - distillation`` times that of the depth that was drawn for each sample, plus
    ``distillation`` times its mean squared distance from the deepest output, which takes no gradient from it (ELT, arXiv 2604.09168).

    Args:
        loss: returns the loss of one output [B, C, H, W].
    """
    *others, deepest = outputs.unbind()
    total = loss(deepest)
    if not others:
        return total
    if config.depth_loss is DepthLoss.every:
        return total + sum(loss(output) for output in others) / len(others)
    (drawn,) = others
    distance = (drawn - deepest.detach()).square().mean()
    return total + (1 - config.distillation) * loss(drawn) + config.distillation * distance
