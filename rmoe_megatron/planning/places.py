"""Which part of the model is at work: every tensor is made by one, in a forward or a backward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.transformer.transformer_layer import BaseTransformerLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rmoe_megatron.planning.listening import BLOCK, OUTSIDE, Listener


@contextmanager
def followed(chunks: nn.ModuleList, listener: Listener) -> Iterator[None]:
    """Tell the listener which block of the model is at work, forward and backward.

    A block's backward pass begins when the gradient of its output is there, and ends when the one before it begins.

    Args:
        chunks: of DiffusionTransformer.
    """
    hooks = []
    for module in chunks.modules():
        if isinstance(module, BaseTransformerLayer):
            name = f"{BLOCK}{module.layer_number - 1}"
            hooks.append(module.register_forward_pre_hook(_entering(listener, name), with_kwargs=True))
            hooks.append(module.register_forward_hook(_leaving(listener, name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _entering(listener: Listener, name: str) -> Callable[..., None]:
    def left_backward(_: Tensor) -> None:
        if listener.place == name:  # else it was the output of the block before, which is at work now
            listener.place = OUTSIDE

    def enter(_: nn.Module, *inputs: Any) -> None:
        listener.place = name
        hidden = _first_tensor(inputs)
        if hidden.requires_grad:
            hidden.register_hook(left_backward)

    return enter


def _leaving(listener: Listener, name: str) -> Callable[..., None]:
    def entered_backward(_: Tensor) -> None:
        listener.place = name

    def leave(_: nn.Module, __: Any, outputs: Any) -> None:
        if listener.phase == "forward":
            listener.place = OUTSIDE
        hidden = _first_tensor(outputs)
        if hidden.requires_grad:
            hidden.register_hook(entered_backward)

    return leave


def _first_tensor(values: Any) -> Tensor:
    """Return the hidden states, which come first in what a block takes and gives."""
    return next(each for each in tree_leaves(values) if isinstance(each, Tensor))
