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
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore

from rmoe_megatron.config.run import Device, EngineName, RunConfig
from rmoe_megatron.distributed.device import select_device
from rmoe_megatron.distributed.process_groups import destroy_groups
from rmoe_megatron.engine.deepspeed.library import import_deepspeed
from rmoe_megatron.model import core_attention
from rmoe_megatron.model.recurrence.dispatch import QueryKeyValueDispatcher
from rmoe_megatron.model.recurrence.experts import Experts
from rmoe_megatron.model.softmax_attention import Way

_new_group: Callable[..., Any] = dist.new_group


@contextmanager
def fake_rank(
    config: RunConfig, rank: int, world_size: int, imbalance: float = 1.0
) -> Iterator[torch.device]:
    """Be one rank of ``world_size``, without the others: everything that is made inside is fake.

    Models choose the kernels of a GPU: fused attention, grouped products of experts.

    Args:
        config: the run's configuration, whose parallel layout fits the number of ranks.
        imbalance: how many times as many tokens as on average this rank's experts get, where experts are spread over ranks.
    """
    device = select_device(Device.cpu)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with _answers_of_other_ranks(config.engine):
            _make_groups(config)
            with FakeTensorMode(allow_non_fake_inputs=True), _gpu_kernels(), _routing(imbalance):
                yield device
    finally:
        destroy_groups()


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
def _answers_of_other_ranks(engine: EngineName) -> Iterator[None]:
    """Make all groups fake, gloo's too, and let the other ranks have the same objects as this one."""

    def new_group(*arguments: Any, **settings: Any) -> Any:
        return _new_group(*arguments, **settings | {"backend": "fake", "pg_options": None})

    def all_gather_object(objects: list[Any], mine: Any, group: Any = None) -> None:
        objects[:] = [mine] * len(objects)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(dist, "new_group", new_group))
        stack.enter_context(mock.patch.object(dist, "all_gather_object", all_gather_object))
        if engine is EngineName.deepspeed:
            stack.enter_context(_answers_to_deepspeed())
        yield


@contextmanager
def _answers_to_deepspeed() -> Iterator[None]:
    """Let ranks agree on the order of layers, which ZeRO's third stage asks in its first step, and norms be finite."""
    import_deepspeed(on_cpu=True)
    from deepspeed.runtime import bf16_optimizer, utils
    from deepspeed.runtime.zero import partitioned_param_coordinator, stage3, stage_1_and_2

    def is_invalid_grad_norm(norm: Any) -> bool:
        is_invalid(norm)
        return False

    is_invalid = utils.is_invalid_grad_norm
    with ExitStack() as stack:
        stack.enter_context(
            mock.patch.object(partitioned_param_coordinator, "assert_ints_same_as_other_ranks")
        )
        for module in (bf16_optimizer, stage_1_and_2, stage3):
            stack.enter_context(mock.patch.object(module, "is_invalid_grad_norm", is_invalid_grad_norm))
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
                changed = function(parameter)
            if changed is not parameter:
                module._parameters[name] = nn.Parameter(changed, parameter.requires_grad)
                module._parameters[name].__dict__.update(parameter.__dict__)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def _shared_out(tokens: int, experts: int) -> Tensor:
    """Return how many tokens each expert gets, int64 [experts]: as many as any other, up to one."""
    each = torch.full((experts,), tokens // max(experts, 1))
    each[: tokens % max(experts, 1)] += 1
    return each


@contextmanager
def _routing(imbalance: float) -> Iterator[None]:
    """Give every expert of this rank as many tokens as any other of it, up to one; the dispatcher reads their numbers on the host."""

    def preprocess(dispatcher: Any, routing_map: Tensor) -> Tensor:
        chosen = len(routing_map) * dispatcher.config.moe_router_topk
        modules, ranks, local = dispatcher.num_experts, dispatcher.ep_size, dispatcher.num_local_experts
        first = dispatcher.local_expert_indices[0]
        # Ranks tell one another how many tokens they have for each module.
        gather_from_sequence_parallel_region(routing_map.sum(dim=0), group=dispatcher.tp_ep_group)
        with unset_fake_temporarily():
            mine = _shared_out(min(chosen, round(chosen * imbalance / ranks)), local)
            others = _shared_out(chosen - int(mine.sum()), modules - local)
            each = torch.cat((others[:first], mine, others[first:]))
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
