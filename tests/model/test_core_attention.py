"""Attention against float64 and Megatron-Core's own, and what its backward pass keeps."""

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from rmoe_megatron.model.core_attention import ScaledDotProductAttention
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
def test_it_is_attention(queries: int, keys: int, dtype: torch.dtype, tolerance: float) -> None:
    config = tiny_config()
    with one_rank(config):
        transformer = transformer_config(config)
        ours = ScaledDotProductAttention(transformer)
        theirs = DotProductAttention(transformer, 1, AttnMaskType.no_mask, "self")
        parts = inputs(queries, keys, dtype)
        exact = [part.detach().double().requires_grad_() for part in parts]
        expected = reference(*exact)
        weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        gradients = torch.autograd.grad((expected * weights).sum(), exact)
        for attention in (ours, theirs):
            output = attention(*parts, attention_mask=None)
            assert output.shape == (queries, 3, HEADS * HEAD_DIM)
            assert (output - expected).norm() < tolerance * expected.norm()
            found = torch.autograd.grad((output * weights.to(dtype)).sum(), parts)
            for mine, exactly in zip(found, gradients, strict=True):
                assert (mine - exactly).norm() < tolerance * exactly.norm()


def test_no_scores_are_kept() -> None:
    """What autograd saves is inputs, output and a number a query: nothing of S x S."""
    config, length = tiny_config(), 512
    with one_rank(config):
        attention = ScaledDotProductAttention(transformer_config(config))
        saved: list[int] = []
        parts = inputs(length, length, torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            attention(*parts)
        assert saved
        assert max(saved) <= parts[0].numel() < 3 * HEADS * length * length
