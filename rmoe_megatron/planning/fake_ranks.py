"""One rank of a run of any size, of tensors without values: the real code runs, and nothing is computed, stored or sent.

PyTorch's fake tensors have shapes, types and storages of a size; its fake process group has any number of ranks and answers at once. What
the code reads from tensors on the host is made up here: routing is balanced, and losses and norms are 1.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore

from rmoe_megatron.config.run import Device, RunConfig
from rmoe_megatron.distributed.device import select_device
from rmoe_megatron.model import core_attention
from rmoe_megatron.model.recurrence.dispatch import QueryKeyValueDispatcher
from rmoe_megatron.model.recurrence.experts import Experts
from rmoe_megatron.model.softmax_attention import Way

_new_group: Callable[..., Any] = dist.new_group


@contextmanager
def fake_rank(config: RunConfig, rank: int, world_size: int) -> Iterator[torch.device]:
    """Be one rank of ``world_size``, without the others: everything that is made inside is fake.

    Models choose the kernels of a GPU: fused attention, grouped products of experts.

    Args:
        config: the run's configuration, whose parallel layout fits the number of ranks.
    """
    device = select_device(Device.cpu)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with _answers_of_other_ranks():
            _make_groups(config)
            with FakeTensorMode(allow_non_fake_inputs=True), _gpu_kernels(), _balanced_routing():
                yield device
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _make_groups(config: RunConfig) -> None:
    parallel, virtual = config.parallel, config.parallel.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=1,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(config.seed)


@contextmanager
def _answers_of_other_ranks() -> Iterator[None]:
    """Make all groups fake, gloo's too, and let the other ranks have the same objects as this one."""

    def new_group(*arguments: Any, **settings: Any) -> Any:
        return _new_group(*arguments, **settings | {"backend": "fake", "pg_options": None})

    def all_gather_object(objects: list[Any], mine: Any, group: Any = None) -> None:
        objects[:] = [mine] * len(objects)

    with (
        mock.patch.object(dist, "new_group", new_group),
        mock.patch.object(dist, "all_gather_object", all_gather_object),
    ):
        yield


@contextmanager
def _gpu_kernels() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(core_attention, "way_to_attend", return_value=Way.fused))
        stack.enter_context(mock.patch.object(Experts, "sorts", lambda self, tokens: self.fits_grouped_mm))
        # PyTorch swaps fake parameters, which it refuses for those that something refers to.
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _apply))
        yield


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    for child in module.children() if recurse else ():
        child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                changed = nn.Parameter(function(parameter), parameter.requires_grad)
            changed.__dict__.update(parameter.__dict__)
            module._parameters[name] = changed
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


@contextmanager
def _balanced_routing() -> Iterator[None]:
    """Give every expert as many tokens as any other, up to one; the dispatcher reads their numbers on the host."""

    def preprocess(dispatcher: Any, routing_map: Tensor) -> Tensor:
        chosen = len(routing_map) * dispatcher.config.moe_router_topk
        modules, ranks, local = dispatcher.num_experts, dispatcher.ep_size, dispatcher.num_local_experts
        with unset_fake_temporarily():
            each = torch.full((modules,), chosen // modules)
            each[: chosen % modules] += 1
            first = dispatcher.local_expert_indices[0]
            mine = each[first : first + local]
            dispatcher.num_out_tokens = chosen
            dispatcher.input_splits = each.view(ranks, local).sum(dim=1).numpy()
            dispatcher.output_splits = mine.sum().repeat(ranks).numpy()
            dispatcher.output_splits_tp = (mine.sum() * ranks).repeat(dispatcher.tp_size).numpy()
            sent = mine.repeat(dispatcher.tp_size * ranks, 1)
            dispatcher.num_global_tokens_per_local_expert = sent
            return sent.sum(dim=0)

    def sort_chunks_by_idxs(
        tokens: Tensor, *_: Any, probs: Tensor | None = None, **__: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Copy, as putting groups of tokens in another order does."""
        return tokens.clone(), None if probs is None else probs.clone()

    with (
        mock.patch.object(QueryKeyValueDispatcher, "preprocess", preprocess),
        mock.patch.object(token_dispatcher, "sort_chunks_by_idxs", sort_chunks_by_idxs),
    ):
        yield
