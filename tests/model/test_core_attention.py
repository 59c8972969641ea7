"""Both ways of attention against float64 and Megatron-Core's own, which one is taken, and what the backward pass keeps."""

from collections.abc import Callable

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from rmoe_megatron.model.core_attention import ScaledDotProductAttention
from rmoe_megatron.model.softmax_attention import (
    MOST_KEPT_BYTES,
    Way,
    attend_by_products,
    attend_fused,
    way_to_attend,
)
from rmoe_megatron.model.transformer_config import transformer_config
from tests.support.configurations import one_rank, tiny_config

HEADS, HEAD_DIM = 2, 16


def inputs(queries: int, keys: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(length, 3, HEADS, HEAD_DIM) for length in (queries, keys, keys)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) / HEAD_DIM**0.5
    return torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1), value).flatten(2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("queries", "keys"), [(10, 10), (7, 19)])
def test_both_ways_are_attention(queries: int, keys: int, dtype: torch.dtype, tolerance: float) -> None:
    config = tiny_config()
    with one_rank(config):
        theirs = DotProductAttention(transformer_config(config), 1, AttnMaskType.no_mask, "self")
        parts = inputs(queries, keys, dtype)
        exact = [part.detach().double().requires_grad_() for part in parts]
        expected = reference(*exact)
        weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        gradients = torch.autograd.grad((expected * weights).sum(), exact)

        def by_megatron(*qkv: torch.Tensor) -> torch.Tensor:
            return theirs(*qkv, attention_mask=None)

        for attend in (attend_by_products, attend_fused, by_megatron):
            output = attend(*parts)
            assert output.shape == (queries, 3, HEADS * HEAD_DIM)
            assert (output - expected).norm() < tolerance * expected.norm()
            found = torch.autograd.grad((output * weights.to(dtype)).sum(), parts)
            for mine, exactly in zip(found, gradients, strict=True):
                assert (mine - exactly).norm() < tolerance * exactly.norm()


@pytest.mark.parametrize(
    ("device", "dtype", "size", "bf16_is_fast", "expected"),
    [
        # batch x heads, tokens; measurements stand beside the rule
        ("cpu", torch.bfloat16, (192, 32), True, Way.products),
        ("cpu", torch.bfloat16, (12, 1101), True, Way.products),
        ("cpu", torch.bfloat16, (192, 32), False, Way.fused),
        ("cpu", torch.float32, (192, 80), True, Way.products),
        ("cpu", torch.float32, (192, 80), False, Way.products),
        ("cpu", torch.float32, (12, 1101), True, Way.fused),
        ("cpu", torch.bfloat16, (24, 4429), True, Way.fused),  # SD3-medium at 1024 pixels: 0.9 GB of scores
        ("cuda", torch.bfloat16, (192, 32), True, Way.fused),
    ],
)
def test_the_faster_way_is_taken(
    device: str, dtype: torch.dtype, size: tuple[int, int], bf16_is_fast: bool, expected: Way
) -> None:
    heads, tokens = size
    assert way_to_attend(torch.device(device), dtype, heads * tokens, tokens, bf16_is_fast) is expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_keep_no_more_scores_than_they_may(dtype: torch.dtype) -> None:
    """At the bound in bytes, which is worked out here by hand: 2**16 rows of as many keys as fill 64 MiB."""
    rows, keys = 2**16, 2**26 // 2**16 // dtype.itemsize
    assert rows * keys * dtype.itemsize == MOST_KEPT_BYTES
    cpu = torch.device("cpu")
    assert way_to_attend(cpu, dtype, rows, keys, bf16_is_fast=True) is Way.products
    assert way_to_attend(cpu, dtype, rows + 1, keys, bf16_is_fast=True) is Way.fused


def saved_values(attend: Callable[..., torch.Tensor], parts: list[torch.Tensor]) -> list[int]:
    """Return how many values autograd saves in each tensor."""
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        attend(*parts)
    return saved


def test_the_layer_takes_the_way_that_the_rule_says() -> None:
    """Seen by what is saved: products keep scores, of S x S, the fused kernel inputs, output and a number a query."""
    config = tiny_config()
    with one_rank(config):
        attention = ScaledDotProductAttention(transformer_config(config))
        for length, keeps_scores in ((64, True), (512, False)):
            parts = inputs(length, length, torch.float32)
            saved = saved_values(lambda *qkv: attention(*qkv, attention_mask=None), parts)
            scores = 3 * HEADS * length * length
            assert (scores in saved) is keeps_scores
            assert max(saved) == (scores if keeps_scores else parts[0].numel())
