"""Rotary positions in two dimensions (RoPE, arXiv 2104.09864, on a grid as in FLUX): attention that sees how far two tokens are apart.

This file needs diffusers alone: an exported folder can carry it (``--remote-code``).
"""

from typing import NamedTuple

import torch
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed
from torch import Tensor


class Rotary(NamedTuple):
    """Cosines and sines of the angles by which the queries and keys of S tokens are turned, each float32 [S, head_dim]."""

    cos: Tensor
    sin: Tensor


def grid_rotary(
    height: int, width: int, head_dim: int, theta: float, device: torch.device, length: int | None = None
) -> Rotary:
    """Return the angles of the tokens of a grid, row by row.

    The first half of a head's dimensions turns with the row, the second with the column. Pair i of the d / 2 dimensions of an axis
    turns by ``theta ** (-2 i / (d / 2))`` a step, for a head of d dimensions.

    Args:
        head_dim: a multiple of 4.
        length: tokens in all; those behind the grid stand where its first one does. None is the grid alone.
    """
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    places = rows.repeat_interleave(width), columns.repeat(height)
    more = 0 if length is None else length - height * width
    padded = [torch.cat((place, place.new_zeros(more))) for place in places]
    tables = [get_1d_rotary_pos_embed(head_dim // 2, place, theta, use_real=True) for place in padded]
    cos, sin = (torch.cat(parts, dim=-1) for parts in zip(*tables, strict=True))
    return Rotary(cos, sin)


def rotate(heads: Tensor, rotary: Rotary) -> Tensor:
    """Turn queries or keys [B, heads, S, head_dim]; the result has their data type, the angles are float32."""
    rotated: Tensor = apply_rotary_emb(heads, rotary)
    return rotated
