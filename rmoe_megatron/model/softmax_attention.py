"""``softmax(q k^T) v`` in two ways, and which of them is the faster one.

*Fused* is PyTorch's scaled_dot_product_attention, which keeps no scores: it computes them in tiles, twice. *Products* are two
batched matrix products with the softmax between them, which keep the scores [B heads, S, S'] for the backward pass. On a GPU
the fused kernels are the faster ones. On a CPU they lose to the products, which run at the processor's rate, until the
scores no longer fit into its caches; :func:`way_to_attend` has the rule.
"""

from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

# Bytes of the scores of one call that products may keep; a block of SD3 at 1024 pixels would have 940 MB of them in bf16.
MOST_KEPT_BYTES = 64 * 2**20
# In fp32, from how many keys on the fused kernel is as fast.
MOST_KEYS_FP32 = 256


class Way(Enum):
    """How attention is computed."""

    fused = "fused"
    products = "products"


def way_to_attend(device: torch.device, dtype: torch.dtype, rows: int, keys: int, bf16_is_fast: bool) -> Way:
    """Return the faster way for attention of this size.

    The rule is what ``tools/benchmark_attention.py`` measured (forward and backward in ms, two cores of an AMD EPYC with
    AVX512-BF16, two threads, torch 2.15.0; in the last four columns its instructions were held to AVX2):

    | batch x heads, tokens, head | bf16 fused | products | fp32 fused | products | bf16 fused | products | fp32 fused | products |
    |---|---|---|---|---|---|---|---|---|
    | 192, 32, 32 | 20.5 | 2.1 | 1.4 | 1.3 | 14.5 | 43.0 | 1.8 | 1.6 |
    | 192, 80, 32 | 67.6 | 6.9 | 7.3 | 6.6 | 68.6 | 254.3 | 7.4 | 7.1 |
    | 512, 80, 48 | 324.6 | 25.5 | 32.6 | 26.6 | 319.6 | 1071.4 | 30.5 | 29.3 |
    | 64, 192, 64 | 50.4 | 13.9 | 19.7 | 17.3 | 273.8 | 1014.3 | 17.2 | 17.5 |
    | 64, 256, 64 | 70.3 | 20.0 | 30.3 | 28.0 | 471.6 | 1739.6 | 33.0 | 32.7 |
    | 48, 333, 64 | 81.3 | 25.0 | 40.0 | 38.0 | 442.4 | 1654.8 | 45.3 | 46.2 |
    | 12, 1101, 64 | 99.5 | 56.7 | 92.1 | 99.6 | 585.9 | 2114.7 | 95.0 | 101.3 |

    Args:
        rows: queries of all heads and samples together.
        keys: how many keys one head of one sample has.
        bf16_is_fast: what :func:`rmoe_megatron.distributed.processor.bf16_is_fast` says of this processor.
    """
    if device.type != "cpu" or rows * keys * dtype.itemsize > MOST_KEPT_BYTES:
        return Way.fused
    if dtype is torch.float32:
        return Way.products if keys <= MOST_KEYS_FP32 else Way.fused
    return Way.products if bf16_is_fast else Way.fused


def attend_by_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend with two batched products; query [S, B, heads, head_dim], key and value [S', ...], result [S, B, heads head_dim]."""
    queries, batch, heads, head_dim = query.shape
    query, key, value = (
        part.permute(1, 2, 0, 3).reshape(batch * heads, -1, head_dim) for part in (query, key, value)
    )
    scores = torch.bmm(query * head_dim**-0.5, key.transpose(1, 2))
    attended = torch.bmm(scores.softmax(dim=-1), value)
    return attended.view(batch, heads, queries, head_dim).permute(2, 0, 1, 3).flatten(2)


def attend_fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend with PyTorch's fused kernels; shapes as those of :func:`attend_by_products`."""
    query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
    output = F.scaled_dot_product_attention(query, key, value)  # [B, heads, S, head_dim]
    return output.permute(2, 0, 1, 3).flatten(2)
