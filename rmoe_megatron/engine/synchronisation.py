"""Where a training step waits for numbers of the device, and why.

On a GPU a number that the host wants to see (``item``, ``tolist``, ``cpu``, the truth of a tensor, sizes that depend on values) stops
the queue of kernels until it is there, and so does a copy to the device that is waited for. Between a batch, which is in pinned memory,
and the update of the weights by Megatron-Core's engine this happens at the places of :data:`ALLOWED` alone; :class:`Recorder` finds others, on any device.
Images and captions that are encoded during training are copied to their encoders before, and waited for.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Module and function, and the reason.
ALLOWED = {
    "rmoe_megatron.engine.megatron.engine:MegatronEngine.step": "loss and norm: a step that is not finite must not touch the weights",
    "megatron.core.transformer.moe.moe_utils:maybe_move_tensor_to_cpu": "modules on several ranks: sizes of the all-to-all",
    "rmoe_megatron.distributed.megatron_on_cpu:_patch_megatron_core.<locals>.maybe_move_tensor_to_cpu": "the same, on the CPU",
    "megatron.core.transformer.moe.moe_utils:sort_chunks_by_idxs": "the same numbers, which are on the host by then",
    "rmoe_megatron.model.recurrence.experts:Packing.__init__": "the longest group: batched products, where grouped_mm can't be had",
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
        found: by place, ``module:function`` of the innermost code of this package or Megatron-Core, what was asked for and
            how often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Counter[str]] = {}

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
        if waits is None and func is torch.ops.aten._to_copy.default:
            waits = _copy(args[0], kwargs)
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
                self.found.setdefault(f"{module}:{frame.f_code.co_qualname}", Counter())[waits] += 1
                return
            assert frame.f_back is not None, "called from outside the package"
            frame = frame.f_back


def _has_mask(indices: list[Tensor | None]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _copy(tensor: Tensor, settings: dict[str, Any] | None) -> str | None:
    """Name a copy between host and device that is waited for."""
    device, non_blocking = (settings or {}).get("device"), (settings or {}).get("non_blocking")
    if device is None or (device.type == "cpu") == (tensor.device.type == "cpu"):
        return None
    if device.type == "cpu":
        return "copy to the host"
    return None if non_blocking else "copy to the device"
