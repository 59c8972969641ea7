"""Makes Megatron-Core run on the CPU.

Megatron-Core is written for CUDA: it asks ``torch.cuda`` for the current device, streams and random state, creates
small tensors with ``device='cuda'`` and compares tensor type names. :func:`use_cpu` gives each of these a CPU meaning.
It is the only place of the project that patches anything. One patch holds on CUDA too: :func:`keep_adam_steps` lets PyTorch's
Adam resume where neither Transformer Engine nor Apex is installed.
"""

import contextlib
import ctypes
import functools
import platform
from collections.abc import Callable, Iterator
from typing import Any

import torch


class _Stream:
    """A CUDA stream or event where everything is done in program order already."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device("cpu")

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def wait(self, _: Any = None) -> None: ...

    def record(self, _: Any = None) -> None: ...

    def record_event(self, _: Any = None) -> "_Stream":
        return self

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


_ONLY_STREAM = _Stream()


@contextlib.contextmanager
def _stream_context(_: Any) -> Iterator[None]:
    yield


@functools.cache
def use_cpu() -> None:
    """Give the CUDA calls of Megatron-Core a CPU meaning in this process; calling it again does nothing."""
    cpu = torch.device("cpu")
    cuda_calls: dict[str, Any] = {
        "current_device": lambda: cpu,
        "set_device": lambda *_: None,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "Stream": _Stream,
        "Event": _Stream,
        "current_stream": lambda *_: _ONLY_STREAM,
        "default_stream": lambda *_: _ONLY_STREAM,
        "stream": _stream_context,
    }
    for name, replacement in cuda_calls.items():
        setattr(torch.cuda, name, replacement)
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.Tensor.type = _cuda_type_name(torch.Tensor.type)  # type: ignore[method-assign]
    _keep_freed_memory()
    # Megatron-Core decorates small functions with torch.compile; on the CPU compiling costs more than it saves.
    torch.compiler.set_stance("force_eager")
    _patch_megatron_core()


def _keep_freed_memory() -> None:
    """Let glibc reuse the memory of freed activations; by default it returns large blocks to the kernel at once.

    Page faults on fresh blocks took up to a quarter of a step. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # <malloc.h>
    libc = ctypes.CDLL(None)
    libc.mallopt(m_arena_max, 1)
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)


class _TorchOnCpu:
    """The torch module as seen by a module of Megatron-Core that creates tensors with ``device='cuda'``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*size, **{**kwargs, "device": "cpu"})

    @staticmethod
    def tensor(data: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(data, **{**kwargs, "device": "cpu"})


def _cuda_type_name(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``Tensor.type`` so that a CPU tensor answers to the CUDA names Megatron-Core's optimizer compares with."""

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = original(self, *args, **kwargs)
        return name.replace("torch.", "torch.cuda.", 1) if not args and not kwargs else name

    return type_


def _patch_megatron_core() -> None:
    """Replace the functions of Megatron-Core that only know CUDA tensors, or that cost the CPU dearly."""
    from megatron.core import utils
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.optimizer import grad_scaler, optimizer
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random as tensor_parallel_random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def maybe_move_tensor_to_cpu(
        tensor: torch.Tensor | None, as_numpy: bool = False, record_stream: bool = False
    ) -> Any:
        return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    for module in (grad_scaler, optimizer, param_and_grad_buffer, schedules, utils):
        module.torch = _TorchOnCpu()
    for module in (moe_utils, token_dispatcher):
        module.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu
    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        setattr(param_and_grad_buffer, name, _copy_if_alone(getattr(param_and_grad_buffer, name)))
    keep_adam_steps()
    _use_pytorch_optimizer()
    tensor_parallel_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    tensor_parallel_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()


def _use_pytorch_optimizer() -> None:
    """Let Megatron-Core take PyTorch's Adam and its own copies, as it does without Transformer Engine and Apex.

    Their kernels are CUDA's alone, and they may be installed here: the CPU is then what a GPU's results are compared with.
    """
    import megatron.core.optimizer as optimizers
    from megatron.core.optimizer import distrib_optimizer, optimizer
    from megatron.core.utils import local_multi_tensor_applier, local_multi_tensor_scale

    optimizers.Adam, optimizers.USING_PYTORCH_OPTIMIZER = torch.optim.AdamW, True
    # Whose optimizer it is decides where its checkpoints have the number of steps.
    for name in ("HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER", "USING_APEX_OPTIMIZER"):
        setattr(distrib_optimizer, name, False)
    optimizer.multi_tensor_applier = local_multi_tensor_applier
    optimizer.multi_tensor_scale_impl = local_multi_tensor_scale


def _copy_if_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a reduce-scatter or all-gather so that a group of one rank copies in the calling thread.

    gloo would copy in a thread of its own, which starts a second team of OpenMP threads; from then on libgomp counts
    more threads than cores and puts waiting threads to sleep, which made every later step 2.5 times slower.
    """

    @functools.wraps(collective)
    def call(output: torch.Tensor, input: torch.Tensor, *args: Any, group: Any, **kwargs: Any) -> Any:
        if group.size() > 1:
            return collective(output, input, *args, group=group, **kwargs)
        output.copy_(input)
        return None

    return call


@functools.cache
def keep_adam_steps() -> None:
    """Let Megatron-Core's distributed optimizer resume PyTorch's Adam, on any device."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    DistributedOptimizer._set_main_param_and_optimizer_states = _keep_adam_step(
        DistributedOptimizer._set_main_param_and_optimizer_states
    )


def _keep_adam_step(set_states: Callable[..., None]) -> Callable[..., None]:
    """Wrap how loaded optimizer state is set: Megatron-Core asks PyTorch's Adam for a ``step`` it did not save."""

    @functools.wraps(set_states)
    def call(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group, index = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][index]]
        set_states(self, model_param, {"step": state["step"], **tensors} if "step" in state else tensors)

    return call
