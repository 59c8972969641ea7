"""The modules' products on every path, forward and backward, against float64 one token at a time."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rmoe_megatron.config.run import Precision
from rmoe_megatron.model.recurrence.experts import Experts, Packing
from tests.support.configurations import HIDDEN, RECURRENCE, one_rank, randomise, tiny_config

TOKENS, MODULES = 50, 4
# Of every token: one module gets half of all, one gets none.
PICKED = torch.tensor([0, 2, 2, 3, 2] * 10)


def build_experts(rank: int | None, precision: Precision) -> Experts:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from rmoe_megatron.model.transformer_config import transformer_config

    recurrence = replace(RECURRENCE, rank=rank, num_modules=MODULES)
    config = tiny_config(recurrence, precision=precision)
    with one_rank(config):
        groups = ProcessGroupCollection.use_mpu_process_groups()
        experts = Experts(transformer_config(config), recurrence, groups)
    randomise(experts)
    return experts


def unsorted(experts: Experts, tokens: Tensor, weights: Tensor) -> Tensor:
    routing_map = PICKED.unsqueeze(1) == torch.arange(MODULES)
    return experts(tokens, routing_map.sum(dim=0), weights, routing_map)


def sorted_by_module(experts: Experts, tokens: Tensor, weights: Tensor) -> Tensor:
    order = PICKED.argsort(stable=True)
    projected = experts(tokens[order], PICKED.bincount(minlength=MODULES), weights[order])
    return projected[order.argsort()]


def grouped(experts: Experts, tokens: Tensor, weights: Tensor) -> Tensor:
    order = PICKED.argsort(stable=True)
    weighted = (tokens * weights.unsqueeze(1).to(tokens.dtype))[order]
    return experts._project_grouped(weighted, PICKED.bincount(minlength=MODULES))[order.argsort()]


def reference(parameters: list[Tensor], tokens: Tensor, weights: Tensor) -> Tensor:
    """Each token by itself: ``B_m A_m x`` or ``W_m x``, times its weight, q, k and v side by side."""
    rows = []
    for token, module, weight in zip(tokens, PICKED.tolist(), weights, strict=True):
        if len(parameters) == 1:
            rows.append(parameters[0][module] @ token * weight)
            continue
        down, up = parameters[0][module], parameters[1][module]
        parts = [up[part] @ (down.chunk(3)[part] @ token) for part in range(3)]
        rows.append(torch.cat(parts) * weight)
    return torch.stack(rows)


@pytest.mark.parametrize("path", [unsorted, sorted_by_module, grouped])
@pytest.mark.parametrize("rank", [8, None])
@pytest.mark.parametrize(("precision", "tolerance"), [(Precision.fp32, 1e-5), (Precision.bf16, 2e-2)])
def test_every_path_is_the_product(
    path: Callable[[Experts, Tensor, Tensor], Tensor],
    rank: int | None,
    precision: Precision,
    tolerance: float,
) -> None:
    experts = build_experts(rank, precision)
    parameters = list(experts.parameters())
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(TOKENS, HIDDEN, generator=generator).to(parameters[0].dtype).requires_grad_()
    # One is what the gate gives; others show whose weight is whose.
    weights = (1 + torch.rand(TOKENS, generator=generator)).requires_grad_()
    inputs = [tokens, weights, *parameters]
    exact = [each.detach().double().requires_grad_() for each in inputs]
    output = path(experts, tokens, weights)
    expected = reference(exact[2:], exact[0], exact[1])
    assert output.shape == (TOKENS, 3 * HIDDEN)
    assert (output - expected).norm() < tolerance * expected.norm()
    gradient = torch.randn(output.shape, generator=generator).to(output.dtype)
    found = torch.autograd.grad(output, inputs, gradient)
    gradients = torch.autograd.grad(expected, exact, gradient.double())
    for mine, exactly in zip(found, gradients, strict=True):
        assert (mine - exactly).norm() < tolerance * exactly.norm()


@pytest.mark.parametrize(("longest", "capacity"), [(0, 32), (1, 32), (32, 32), (33, 64)])
def test_a_block_is_as_long_as_its_longest_group_in_steps_of_32(longest: int, capacity: int) -> None:
    assert Packing(torch.tensor([0, longest, longest // 2])).shape == (3, capacity)


def test_tokens_come_back_to_their_places_and_gaps_are_zero() -> None:
    counts = PICKED.bincount(minlength=MODULES)
    packing = Packing(counts)
    tokens = 1 + torch.arange(TOKENS, dtype=torch.float32).unsqueeze(1)
    rows = packing.rows_of(PICKED.unsqueeze(1) == torch.arange(MODULES))
    packed = packing.pack(tokens, rows)
    for module in range(MODULES):
        mine = tokens[module == PICKED]
        assert torch.equal(packed[module, : len(mine)], mine)
        assert not packed[module, len(mine) :].any()
    assert torch.equal(packing.unpack(packed, rows), tokens)
