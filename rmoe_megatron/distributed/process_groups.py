"""Process groups and seeds of a run."""

import platform
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import rendezvous

from rmoe_megatron.config.loading import to_yaml
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.distributed.device import communication_backend, select_device
from rmoe_megatron.distributed.launch import local_rank, rank, rendezvous_url, world_size
from rmoe_megatron.distributed.rank_watch import watch_ranks
from rmoe_megatron.errors import UserError
from rmoe_megatron.versions import LIBRARIES, versions_of


@contextmanager
def process_groups(config: RunConfig) -> Iterator[torch.device]:
    """Set up torch.distributed and Megatron-Core's groups for the duration of a run; yields this rank's device.

    Rank, world size and rendezvous come from torchrun's or srun's variables (:mod:`rmoe_megatron.distributed.launch`); without them
    the run has one rank and needs no port. With several ranks, the end of one is the end of all.

    Raises:
        UserError: the ranks have different configurations, code, libraries or devices.
    """
    device = select_device(config.device, local_rank())
    with _torch_distributed(communication_backend(device)):
        check_ranks_agree(config, device)
        parallel, virtual = config.parallel, config.parallel.virtual_pipeline_model_parallel_size
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=1,  # a module lives whole on its rank; expert ranks fold over tensor ranks
        )
        tensor_parallel.model_parallel_cuda_manual_seed(config.seed)
        yield device


@contextmanager
def _torch_distributed(backend: str) -> Iterator[None]:
    if world_size() == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            destroy_groups()
        return
    store, _, _ = next(rendezvous(rendezvous_url()))
    with watch_ranks(store, rank(), world_size()):  # before the ranks meet: one that has failed does not come
        dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size())
        yield
    destroy_groups()


def destroy_groups() -> None:
    """Give all process groups back, Megatron-Core's, DeepSpeed's and PyTorch's."""
    parallel_state.destroy_model_parallel()
    comm = sys.modules.get("deepspeed.comm.comm")
    if comm is not None and comm.cdb is not None:
        comm.destroy_process_group()  # DeepSpeed keeps groups of its own
    else:
        dist.destroy_process_group()


def check_ranks_agree(config: RunConfig, device: torch.device) -> None:
    """Compare configuration, code, libraries and devices of all ranks.

    Raises:
        UserError: names the first rank that differs from rank 0, and in what.
    """
    gpu = []
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = [
            f"GPU {properties.name} of {properties.total_memory >> 30} GiB",
            f"CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}",
        ]
    check_same_on_all_ranks(
        [
            *to_yaml(config).splitlines(),
            f"Python {platform.python_version()}",
            *(f"{name} {number}" for name, number in versions_of(*LIBRARIES).items()),
            *gpu,
        ],
        "start all ranks with the same command, configuration and installation, on devices of one kind",
    )


def check_same_on_all_ranks(mine: list[str], advice: str) -> None:
    """Compare what every rank says of itself.

    Args:
        mine: a text for each thing that has to be the same.
        advice: what is to be done if it is not.

    Raises:
        UserError: on every rank; names the first rank that differs from rank 0, and in what.
    """
    if dist.get_world_size() == 1:
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), mine))
    for number, (host, theirs) in enumerate(everyone):
        pairs = zip_longest(theirs, everyone[0][1], fillvalue="nothing")
        difference = next(
            (f"{other!r} instead of {first!r}" for other, first in pairs if other != first), None
        )
        if difference is not None:
            raise UserError(f"Rank {number} on {host} differs from rank 0: it has {difference}; {advice}.")
