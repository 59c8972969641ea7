"""Names and layouts of weights: the Megatron-Core model's on one side, diffusers' on the other.

A rule says which diffusers tensors one tensor of the Megatron-Core model is, and converts in both directions without
touching a value.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rmoe_megatron.config.model import ModelConfig
from rmoe_megatron.model.registry import ADAPTERS, FAMILIES

_BLOCK = re.compile(r"transformer\.layers\.(\d+)\.(.+)")
_CONDITIONING = re.compile(r"conditioning\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Rule:
    """One tensor on either side."""

    names: tuple[str, ...]

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Return the diffusers tensors in the order of ``names``."""
        return [tensor] * len(self.names)

    def join(self, tensors: list[Tensor]) -> Tensor:
        """Return the Megatron-Core tensor."""
        return tensors[0]


@dataclass(frozen=True)
class Copies(Rule):
    """One tensor that diffusers keeps in every block; any of the copies gives it back."""


@dataclass(frozen=True)
class QueryKeyValueRule(Rule):
    """Three projections as one, with rows ordered (head, q|k|v, head_dim)."""

    heads: int

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Return the weights or biases of q, k and v."""
        parts = tensor.unflatten(0, (self.heads, 3, -1)).unbind(dim=1)
        return [part.flatten(0, 1).contiguous() for part in parts]

    def join(self, tensors: list[Tensor]) -> Tensor:
        """Return the rows of q, k and v interleaved by head."""
        parts = [tensor.unflatten(0, (self.heads, -1)) for tensor in tensors]
        return torch.stack(parts, dim=1).flatten(0, 2).contiguous()


def weight_rules(names: Iterable[str], model: ModelConfig) -> dict[str, Rule]:
    """Return the rule of every tensor of a Megatron-Core model.

    Args:
        names: the names of the unsharded model's state; Megatron-Core's ``_extra_state`` entries are left out.

    Raises:
        KeyError: a name has no counterpart in diffusers.
    """
    return {name: _rule(name, model) for name in names if not name.endswith("_extra_state")}


def to_diffusers(tensors: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Rename and split the tensors of an unsharded model, or some of them."""
    rules = weight_rules(tensors, model)
    return {
        target: part
        for name, rule in rules.items()
        for target, part in zip(rule.names, rule.split(tensors[name]), strict=True)
    }


def _rule(name: str, model: ModelConfig) -> Rule:
    block = _BLOCK.fullmatch(name)
    if block is not None:
        return _block_rule(f"transformer_blocks.{block.group(1)}.", block.group(2), model)
    conditioning = _CONDITIONING.fullmatch(name)
    if conditioning is not None:
        index, local = int(conditioning.group(1)), conditioning.group(2)
        blocks = range(model.num_layers) if model.shared_conditioning else [index]
        return Copies(tuple(f"transformer_blocks.{number}.norm1.emb.{local}" for number in blocks))
    module, _, parameter = name.rpartition(".")
    return Rule((f"{FAMILIES[model.architecture].weights.ends.get(module, module)}.{parameter}",))


def _block_rule(prefix: str, local: str, model: ModelConfig) -> Rule:
    names = FAMILIES[model.architecture].weights
    for adapter in ADAPTERS:
        added = local.removeprefix(f"{adapter.name}.")
        if added != local:
            return Rule((f"{prefix}{names.attention}.{adapter.weight_names[added]}",))
    if local in names.tensors:
        return Rule((prefix + names.tensors[local],))
    module, _, parameter = local.rpartition(".")
    if module in names.projections:
        projections = tuple(f"{prefix}{name}.{parameter}" for name in names.projections[module])
        return QueryKeyValueRule(projections, model.num_attention_heads)
    return Rule((f"{prefix}{names.modules[module]}.{parameter}",))
