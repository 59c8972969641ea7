"""Stateless random numbers: each value is a function of (seed, sample, purpose, position) and of nothing else.

All randomness of a training step (noise, timestep, guidance dropout, Gumbel noise of the gates) is drawn this way, so
it depends neither on the parallel layout nor on recomputation, and a resumed run needs no random state for it.

The generator hashes a 64-bit counter with the finalizer of SplitMix64 (Steele, Lea, Flood, 2014; public domain
constants), applied once per key. It works on int64 tensors, whose arithmetic wraps modulo 2**64, on any device.
"""

import math
from enum import IntEnum, unique

import torch
from torch import Tensor


@unique
class Purpose(IntEnum):
    """What a random number is for; different purposes never share a stream."""

    noise = 1
    timestep = 2
    guidance_dropout = 3
    gumbel = 4
    caption = 5
    samples = 6  # the noise that the pictures of a run start from
    loop = 7  # a pass of looped blocks but the first
    depth = 8  # the shallower depth that a sample's loss sees
    latents = 9  # which latents of an autoencoder's distribution are taken
    augmentation = 10  # which part of a picture is seen, and whether it is mirrored


def _signed(value: int) -> int:
    """Reinterpret an unsigned 64-bit integer as int64."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift_right(value, 30)) * _MIX1
    value = (value ^ _shift_right(value, 27)) * _MIX2
    return value ^ _shift_right(value, 31)


def derive(keys: Tensor, *indices: int) -> Tensor:
    """Return a new key for every key and the given indices (for instance purpose, layer, latent step).

    Args:
        keys: int64 of any shape, for instance one key per sample.
    """
    for index in indices:
        keys = _mix(keys * _GOLDEN + _signed(index * 0xD1342543DE82EF95 + 1))
    return keys


def sample_keys(seed: int, draw_index: Tensor) -> Tensor:
    """Return one int64 key per sample of the run, [B]; ``draw_index`` is the number of the draw, int64 [B]."""
    return derive(draw_index.to(torch.int64), seed)


def uniform(keys: Tensor, count: int, first: int = 0) -> Tensor:
    """Return the float32 numbers ``first`` to ``first + count`` of every key, inside (0, 1): [*keys.shape, count]."""
    counter = torch.arange(first + 1, first + count + 1, dtype=torch.int64, device=keys.device)
    bits = _mix(keys.unsqueeze(-1) + counter * _GOLDEN)
    return (_shift_right(bits, 41).to(torch.float32) + 0.5) * 2.0**-23


def normal(keys: Tensor, count: int) -> Tensor:
    """Return ``count`` standard normal float32 numbers for every key (Box-Muller): [*keys.shape, count]."""
    half = (count + 1) // 2
    radius, angle = uniform(keys, 2 * half).chunk(2, dim=-1)
    radius = torch.sqrt(-2.0 * torch.log(radius))
    angle = 2.0 * math.pi * angle
    return torch.cat((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)[..., :count]


def gumbel(keys: Tensor, count: int, first: int = 0) -> Tensor:
    """Return the Gumbel(0, 1) numbers ``first`` to ``first + count`` of every key, float32: [*keys.shape, count]."""
    return -torch.log(-torch.log(uniform(keys, count, first)))
