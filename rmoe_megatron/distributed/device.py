"""Which device, backend and data type a run uses, and what makes Megatron-Core run on the CPU.

Megatron-Core is written for CUDA: it asks ``torch.cuda`` for the current device, streams and random state, creates
small tensors with ``device='cuda'`` and compares tensor type names. :func:`use_cpu` gives each of these a CPU meaning.
It is the only place of the project that patches anything. On CUDA one function is: PyTorch's Adam is resumed there too, where
neither Transformer Engine nor Apex is installed.
"""

import contextlib
import ctypes
import functools
import platform
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch

from rmoe_megatron.config.run import Device, Precision
from rmoe_megatron.errors import UserError

# Of every precision but auto, which is one of the others before anything is built.
PARAMS_DTYPE: dict[Precision, torch.dtype] = {
    precision: torch.float32 if precision is Precision.fp32 else torch.bfloat16
    for precision in Precision
    if precision is not Precision.auto
}

# Dense bf16 throughput in FLOP/s of the devices whose data sheets state it; anything else has no known peak.
PEAK_BF16_FLOPS = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12}


def select_device(device: Device, local_rank: int = 0) -> torch.device:
    """Return the device of this rank and prepare Megatron-Core for it.

    Args:
        device: what the configuration asks for.
        local_rank: index of this process on its host; picks the GPU.

    Raises:
        UserError: CUDA is asked for and there is none, or there are fewer GPUs than ranks on this host.
    """
    has_cuda = _has_cuda()
    if device is Device.cuda and not has_cuda:
        raise UserError("device is cuda but PyTorch finds no GPU here; set device=cpu or device=auto.")
    if device is Device.cpu or not has_cuda:
        use_cpu()
        return torch.device("cpu")
    gpu = _own_gpu(local_rank)
    torch.cuda.set_device(local_rank)
    _keep_adam_steps()
    return gpu


def inference_device(local_rank: int) -> torch.device:
    """Return the device that this rank runs a trained model on: its GPU if there are some, else the CPU.

    Nothing is prepared for Megatron-Core, which models of diffusers and transformers do not need.

    Raises:
        UserError: there are fewer GPUs than ranks on this host.
    """
    return _own_gpu(local_rank) if torch.cuda.is_available() else torch.device("cpu")


def _own_gpu(local_rank: int) -> torch.device:
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"Rank {local_rank} of this host finds {torch.cuda.device_count()} GPU(s); start one task for each GPU and let "
            "every task see all of them (srun --gpus-per-node, without --gpus-per-task and --gpu-bind)."
        )
    return torch.device("cuda", local_rank)


def runs_on_cuda(device: Device) -> bool:
    """Return whether the device that a configuration asks for is a GPU."""
    return device is not Device.cpu and _has_cuda()


def communication_backend(device: torch.device) -> str:
    """Return the torch.distributed backend for ``device``; checkpoint metadata travels over gloo on either."""
    return "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 peak of ``device`` in FLOP/s, None where no data sheet value is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in PEAK_BF16_FLOPS.items() if model in name), None)


def device_memory(device: torch.device) -> int:
    """Return the bytes of a GPU's memory, or of the host's for the CPU, which all ranks of the host share."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes that this process's tensors have taken on a GPU; None for the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def synchronize(device: torch.device) -> None:
    """Wait for the kernels queued on ``device``, so that a clock read after it measures finished work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compiled(function: Callable[..., Any], fullgraph: bool) -> Callable[..., Any]:
    """Return ``function`` through torch.compile, on the CPU too, where nothing else is compiled (see :func:`use_cpu`).

    Args:
        fullgraph: raise an error where it is not one graph.
    """
    # Kinds of blocks, times gradients on or off, times static and dynamic sizes; above the limit PyTorch falls back.
    torch._dynamo.config.recompile_limit = 64
    compiled_function = torch.compile(function, fullgraph=fullgraph)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.compiler.set_stance("default"):
            return compiled_function(*args, **kwargs)

    return call


@functools.cache
def _has_cuda() -> bool:
    return torch.cuda.is_available()


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
    _keep_adam_steps()
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
def _keep_adam_steps() -> None:
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
