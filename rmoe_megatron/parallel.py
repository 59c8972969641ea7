"""Process groups and seeds of a run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from rmoe_megatron.config.schema import RunConfig
from rmoe_megatron.platform import communication_backend, select_device


@contextmanager
def process_groups(config: RunConfig) -> Iterator[torch.device]:
    """Set up torch.distributed and Megatron-Core's groups for the duration of a run; yields this rank's device.

    Rank, world size and rendezvous come from torchrun's variables; without them the run has one rank and needs
    no port.
    """
    device = select_device(config.device, int(os.environ.get("LOCAL_RANK", "0")))
    backend = communication_backend(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = config.parallel
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(config.seed)
        yield device
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def world_size() -> int:
    """Return the number of ranks that torchrun started, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return this process's rank, 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))
