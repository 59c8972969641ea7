"""Where a training step waits for numbers of the device, and why.

On a GPU a number that the host wants to see (``item``, ``tolist``, ``cpu``, the truth of a tensor, sizes that depend on values) stops
the queue of kernels until it is there. Between a batch and the update of the weights of an MM-DiT this happens at the places of
:data:`ALLOWED` alone; :class:`Recorder` finds others, on any device. Copies from the host to the device that are waited for are not
among what it finds: DDPM still makes some.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Module and function, and the reason.
ALLOWED = {
    "rmoe_megatron.engine.megatron.engine:mean_over_data_parallel": "the loss: a step that is not finite must not touch the weights",
    "megatron.core.optimizer.clip_grads:get_grad_norm_fp32": "the gradient's norm, for the same reason; Megatron-Core has it as a number",
    "megatron.core.utils:local_multi_tensor_l2_norm": "the same where neither Transformer Engine nor Apex is installed",
    "megatron.core.transformer.moe.moe_utils:sort_chunks_by_idxs": "how many tokens each module gets: sizes of a split",
    "megatron.core.transformer.moe.moe_utils:maybe_move_tensor_to_cpu": "the same, sizes of the all-to-all",
    "rmoe_megatron.platform:_patch_megatron_core.<locals>.maybe_move_tensor_to_cpu": "the same, on the CPU",
    "rmoe_megatron.model.recurrence.experts:Packing.__init__": "the longest group, of the same numbers: batched products, not grouped_mm",
}
# Operations whose result, or its size, the host waits for.
WAITING = {
    "aten::_local_scalar_dense": "item",
    "aten::nonzero": "nonzero",
    "aten::masked_select": "masked_select",
    "aten::_unique2": "unique",
    "aten::repeat_interleave.Tensor": "repeat_interleave",
}
METHODS = ("tolist", "numpy", "cpu")
PACKAGES = ("rmoe_megatron.", "megatron.")


class Recorder(TorchDispatchMode):
    """Finds where the host waits for tensors while the context is open.

    Attributes:
        found: by place, ``module:function`` of the innermost code of this package or Megatron-Core, what was asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, set[str]] = {}

    @contextmanager
    def recording(self) -> Iterator["Recorder"]:
        """Record what is done in the context."""
        with ExitStack() as stack:
            # On the CPU these are no operations that PyTorch dispatches.
            for name in METHODS:
                stack.enter_context(patch.object(Tensor, name, self._noting(name, getattr(Tensor, name))))
            stack.enter_context(self)
            yield self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note an operation that the host waits for, and do it."""
        waits = WAITING.get(func.name().removesuffix(".default"))
        if waits is None and func is torch.ops.aten.index.Tensor and _has_mask(args[1]):
            waits = "index with a mask"
        if waits is None and func is torch.ops.aten._to_copy.default and _leaves_device(args[0], kwargs):
            waits = "copy to the host"
        if waits is not None:
            self._note(waits)
        return func(*args, **(kwargs or {}))

    def _noting(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Tensor, *arguments: Any, **settings: Any) -> Any:
            self._note(name)
            return method(tensor, *arguments, **settings)

        return call

    def _note(self, waits: str) -> None:
        frame = sys._getframe(2)
        while frame is not None:
            module = frame.f_globals.get("__name__", "")
            if module.startswith(PACKAGES) and module != __name__:
                self.found.setdefault(f"{module}:{frame.f_code.co_qualname}", set()).add(waits)
                return
            assert frame.f_back is not None, "called from outside the package"
            frame = frame.f_back


def _has_mask(indices: list[Tensor | None]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _leaves_device(tensor: Tensor, settings: dict[str, Any] | None) -> bool:
    device = (settings or {}).get("device")
    return device is not None and device.type == "cpu" and tensor.device.type != "cpu"
