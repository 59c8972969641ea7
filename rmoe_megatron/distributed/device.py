"""Which device, communication backend and data type a process uses, and what it knows of its device."""

import functools
from collections.abc import Callable
from typing import Any

import psutil
import torch

from rmoe_megatron.config.run import Device, Precision
from rmoe_megatron.distributed.megatron_on_cpu import keep_adam_steps, use_cpu
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
    keep_adam_steps()
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
    """Return ``function`` through torch.compile, on the CPU too, where nothing else is compiled (see :func:`~rmoe_megatron.distributed.megatron_on_cpu.use_cpu`).

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
