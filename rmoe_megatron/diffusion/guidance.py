"""Classifier-free guidance (Ho and Salimans, 2022): dropped conditions in training, extrapolation in sampling."""

import torch
from torch import Tensor

from rmoe_megatron.config.model import DiffusionConfig
from rmoe_megatron.counter_rng import Purpose, derive, uniform
from rmoe_megatron.data.batch import Conditions


def drop_conditions[C: Conditions](config: DiffusionConfig, conditions: C, null: C, rng_keys: Tensor) -> C:
    """Replace a share of the samples' conditions by the empty one.

    Args:
        conditions: the conditions of B samples.
        null: the empty caption's or the dropped label's, each [1, ...].
        rng_keys: int64 [B], one key per sample.
    """
    dropped = uniform(derive(rng_keys, Purpose.guidance_dropout), 1).squeeze(-1) < config.guidance_dropout
    return conditions.combine(
        null, lambda values, empty: torch.where(dropped.view(-1, *[1] * (values.dim() - 1)), empty, values)
    )


def guide(output: Tensor, guidance: float) -> Tensor:
    """Extrapolate from the unconditional half of a batch to the conditional one; output [2 B, ...] to [B, ...]."""
    conditional, unconditional = output.chunk(2)
    return unconditional + guidance * (conditional - unconditional)
