"""The sharding table of rmoe_megatron/model/README.md: which rank holds what, and what the collectives move."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rmoe_megatron.config.model import LoraConfig
from rmoe_megatron.config.run import ParallelConfig, RunConfig
from rmoe_megatron.counter_rng import sample_keys
from tests.support.ranks import MMDIT, RECURRENT, batches, configuration, layout, perturb, run_on_ranks

# Two blocks: SD3's block, and its last one, which has no text output.
MODEL = replace(MMDIT, num_layers=2, dual_attention_layers=[])
STEPS, MODULES, RANK = 3, 4, 4
DENSE = configuration(MODEL, recurrent=False)
RECURSIVE = configuration(MODEL, recurrent=True, recurrence=replace(RECURRENT, layers=[0], steps=STEPS))
LORA = configuration(MODEL, recurrent=False, lora=LoraConfig(layers=[0], rank=RANK))

BATCH, VISION, TEXT, HIDDEN = 2, 16, 6, 32

TENSOR_SHARDED = (
    "linear_qkv.weight", "linear_qkv.bias", "linear_qkv_context.weight", "linear_qkv_context.bias",
    "linear_proj.weight", "linear_proj_context.weight", "linear_fc1.weight", "linear_fc1.bias", "linear_fc2.weight",
    "modulation.linear.weight", "modulation.linear.bias", "modulation_context.linear.weight",
    "modulation_context.linear.bias", "modulation_out.linear.weight", "modulation_out.linear.bias", "lora.up",
)  # fmt: skip
EXPERT_SHARDED = ("experts.down", "experts.up", "experts.weight")


class CollectiveCounter(TorchDispatchMode):
    """Counts the elements that each kind of collective gives to (reduce-scatter: takes from) this rank."""

    TENSOR = {"_allgather_base_": 0, "_reduce_scatter_base_": 1, "alltoall_base_": 0, "allreduce_": 0}

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[str, int] = dict.fromkeys(self.TENSOR, 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d" and function._opname in self.TENSOR:
            tensors = args[self.TENSOR[function._opname]]
            tensors = [tensors] if torch.is_tensor(tensors) else tensors
            self.elements[function._opname] += sum(tensor.numel() for tensor in tensors)
        return function(*args, **(kwargs or {}))


def shares(config: RunConfig) -> dict[str, float]:
    """Which share of each parameter rank 0 holds."""
    from rmoe_megatron.checkpoint.model_state import full_state
    from rmoe_megatron.distributed.process_groups import process_groups
    from rmoe_megatron.model.build import build_chunks

    with process_groups(config):
        chunks = build_chunks(config)
        trained = {name for name, _ in chunks.named_parameters()}
        return {
            entry.key: entry.data.numel() / torch.Size(entry.global_shape).numel()
            for name, entry in full_state(chunks).items()
            if name in trained
        }


def traffic(config: RunConfig) -> dict[str, int]:
    """Elements that collectives give to all ranks together in one forward pass."""
    from rmoe_megatron.diffusion.loss import model_arguments
    from rmoe_megatron.distributed.process_groups import process_groups
    from rmoe_megatron.model.build import build_chunks

    with process_groups(config):
        chunks = build_chunks(config)
        perturb(chunks)
        batch = next(batches(config))[0]
        keys = sample_keys(0, batch.draw_index)
        arguments = model_arguments(batch.latents, torch.tensor([5.0, 600.0]), keys, batch.conditions)
        with CollectiveCounter() as counter, torch.no_grad():
            chunks.train(False)[0](**arguments)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, counter.elements)
        return {name: sum(elements[name] for elements in everyone) for name in everyone[0]}


@pytest.mark.parametrize("config", [RECURSIVE, LORA], ids=["recurrent", "lora"])
def test_a_rank_holds_what_the_table_says(config: RunConfig, tmp_path: Path) -> None:
    expert = 2 if config.recurrence else 1
    parallel = layout(tp=2, ep=expert)
    found = run_on_ranks(2, {"shares": replace(config, parallel=parallel)}, tmp_path, shares)["shares"]
    assert any(name.endswith(EXPERT_SHARDED + ("lora.up",)) for name in found)
    for name, share in found.items():
        expected = 1 / 2 if name.endswith(TENSOR_SHARDED + EXPERT_SHARDED) else 1
        assert share == expected, name


@pytest.mark.parametrize(
    ("config", "parallel"),
    [
        pytest.param(DENSE, layout(tp=2), id="TP2"),
        pytest.param(RECURSIVE, layout(tp=2), id="TP2-recurrent"),
        pytest.param(RECURSIVE, layout(tp=2, ep=2), id="EP2-over-TP2"),
        pytest.param(RECURSIVE, layout(ep=2), id="EP2"),
        pytest.param(RECURSIVE, layout(cp=2), id="CP2"),
        pytest.param(DENSE, layout(tp=4), id="TP4"),
    ],
)
def test_collectives_move_what_the_table_says(
    config: RunConfig, parallel: ParallelConfig, tmp_path: Path
) -> None:
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    expert, ranks = (
        parallel.expert_model_parallel_size,
        max(tensor * context, parallel.expert_model_parallel_size),
    )
    found = run_on_ranks(ranks, {"traffic": replace(config, parallel=parallel)}, tmp_path, traffic)["traffic"]

    steps = STEPS if config.recurrence else 0
    vision, text = VISION * BATCH * HIDDEN, -(-TEXT // (tensor * context)) * tensor * context * BATCH * HIDDEN
    vector = BATCH * HIDDEN
    patches = VISION * BATCH * MODEL.patch_size**2 * MODEL.in_channels
    blocks = 2
    gathered = scattered = exchanged = 0
    if tensor > 1:
        # Each block's, the output's, and the one that all latent steps share.
        modulations = (6 + 6) + (6 + 2) + 2 + (2 if steps else 0)
        gathered += modulations * vector
        gathered += blocks * (vision + text) + blocks * vision + text  # before Q/K/V and before the MLPs
        gathered += patches
        scattered += blocks * vision + text + blocks * vision + text  # after attention and after the MLPs
        scattered += max(steps - 1, 0) * vision
        exchanged += steps * 3 * vision // tensor  # all heads of some tokens to some heads of all tokens
    if context > 1:
        calls = blocks + max(steps - 1, 0)
        gathered += 2 * (calls * vision + blocks * text) + patches  # keys and values
    exchanged = exchanged * tensor * context
    if expert > 1:
        replicas = ranks // (tensor * context)
        tokens = replicas * VISION * BATCH
        exchanged += (
            steps * tokens * (HIDDEN + 1 + 3 * HIDDEN)
        )  # token and weight out, query, key and value back
    assert found["_allgather_base_"] == ranks * gathered + counts_per_module(steps, expert, ranks)
    assert found["_reduce_scatter_base_"] == ranks * scattered
    assert found["alltoall_base_"] == exchanged
    assert found["allreduce_"] == 0


def counts_per_module(steps: int, expert: int, ranks: int) -> int:
    """The dispatcher gathers over expert-parallel ranks how many tokens each of them sends to each module."""
    return steps * ranks * expert * MODULES if expert > 1 else 0


def route_to_first_module(config: RunConfig) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Per rank: the output for a batch whose tokens all go to module 0, and the modules' gradients."""
    from rmoe_megatron.diffusion.loss import model_arguments
    from rmoe_megatron.distributed.process_groups import process_groups
    from rmoe_megatron.model.build import build_chunks

    with process_groups(config):
        chunks = build_chunks(config).eval()
        perturb(chunks)
        (model,) = chunks
        for name, parameter in model.named_parameters():
            if "recurrence.gate." in name:
                parameter.data.zero_()  # of equal logits the first is picked
        batch = next(batches(config))[0]
        keys = sample_keys(0, batch.draw_index)
        output = model(**model_arguments(batch.latents, torch.tensor([5.0, 600.0]), keys, batch.conditions))
        output.sum().backward()
        gradients = {
            name: parameter.grad
            for name, parameter in model.named_parameters()
            if name.endswith(EXPERT_SHARDED)
        }
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (output.detach(), gradients))
        return everyone


def test_a_rank_whose_modules_get_no_tokens(tmp_path: Path) -> None:
    case = {"EP2": replace(RECURSIVE, parallel=layout(ep=2))}
    first, second = run_on_ranks(2, case, tmp_path, route_to_first_module)["EP2"]
    assert len(second[1]) == 2
    for name, gradient in second[1].items():
        assert torch.equal(gradient, torch.zeros_like(gradient)), name
        assert first[1][name][0].norm() > 0, name
        assert first[1][name][1].norm() == 0, name
    ((alone, _),) = route_to_first_module(RECURSIVE)
    torch.testing.assert_close(first[0], alone)


def graphs_kept(config: RunConfig) -> list[str]:
    """What the dispatchers of modules hold after a step that leads into its graph."""
    from rmoe_megatron.diffusion.loss import DiffusionLoss
    from rmoe_megatron.distributed.process_groups import process_groups
    from rmoe_megatron.engine.megatron.engine import MegatronEngine
    from rmoe_megatron.model.build import build_chunks

    with process_groups(config):
        modules = build_chunks(config)
        batch = next(batches(config))[0]
        null = batch.conditions.map(lambda tensor: tensor[:1])
        MegatronEngine(config, modules, DiffusionLoss(config, config.seed, null)).step([batch])
        dispatchers = [vars(each.dispatcher) for each in modules.modules() if hasattr(each, "dispatcher")]
        assert [each["hidden_shape"][-1] for each in dispatchers] == [
            3 * HIDDEN
        ]  # it was used, and gave q, k and v
        return [
            name
            for attributes in dispatchers
            for name, value in attributes.items()
            if isinstance(value, Tensor) and value.grad_fn is not None
        ]


def test_dispatch_to_other_ranks_holds_no_graph(tmp_path: Path) -> None:
    """One would lead to the model, in a circle that Python does not see: its memory would never be free again."""
    config = replace(RECURSIVE, parallel=layout(ep=2))
    assert run_on_ranks(2, {"EP2": config}, tmp_path, graphs_kept)["EP2"] == []
