"""Experts that are spread over ranks, as DeepSpeed knows them: by a mark, and by groups that are Megatron-Core's."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn


def mark_experts(parameters: Iterable[nn.Parameter], expert_model_parallel_size: int) -> None:
    """Make the mark of experts' parameters (``allreduce=False``, Megatron-Core's and DeepSpeed's) mean the same to DeepSpeed.

    Where every rank has all experts they are parameters like any other, and the mark is taken away. Where they are spread
    DeepSpeed wants the name of the groups too, or it would give one rank's experts to all.
    """
    for parameter in parameters:
        if not is_expert(parameter):
            continue
        if expert_model_parallel_size == 1:
            del parameter.allreduce  # type: ignore[attr-defined]
        else:
            parameter.group_name = group_name(expert_model_parallel_size)  # type: ignore[attr-defined]


def is_expert(parameter: Any) -> bool:
    """Whether a parameter is of an expert, and marked as one."""
    return not getattr(parameter, "allreduce", True)


def group_name(expert_model_parallel_size: int) -> str:
    """Return DeepSpeed's name of the groups of a size."""
    return f"ep_size_{expert_model_parallel_size}"


@contextmanager
def expert_groups_registered(
    model: nn.Module, expert_model_parallel_size: int, trained: Iterable[Any]
) -> Iterator[None]:
    """While DeepSpeed's engine is made, tell it of Megatron-Core's groups and that there are experts to be trained."""
    if expert_model_parallel_size == 1:
        yield
        return
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    name = group_name(expert_model_parallel_size)
    for known, ranks, group in (
        (groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_PARALLEL_GROUP_RANKS, parallel_state.get_expert_model_parallel_group()),
        (groups._EXPERT_DATA_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP_RANKS, parallel_state.get_expert_data_parallel_group()),
    ):  # fmt: skip
        known[name], ranks[name] = group, dist.get_process_group_ranks(group)
    if not any(map(is_expert, trained)):
        yield
        return

    class MoEMarker(MoE):
        """What DeepSpeed recognises a model with experts by; it has nothing and does nothing."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = 0

        def set_deepspeed_parallelism(self, *_: Any) -> None:
            pass

    model.add_module("deepspeed_marker", MoEMarker())
    try:
        yield
    finally:
        del model.deepspeed_marker
