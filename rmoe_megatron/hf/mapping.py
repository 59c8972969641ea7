"""Names and layouts of weights: the Megatron-Core model's on one side, diffusers' on the other.

A rule says which diffusers tensors one tensor of the Megatron-Core model is, and converts in both directions without
touching a value.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rmoe_megatron.config.model import Architecture, ModelConfig

# Module of a block -> module in diffusers; each holds `weight` and `bias`.
_MLP = {"mlp.linear_fc1": "ff.net.0.proj", "mlp.linear_fc2": "ff.net.2"}
_JOINT_MODULES = _MLP | {
    "modulation.linear": "norm1.linear",
    "modulation_context.linear": "norm1_context.linear",
    "attention.linear_proj": "attn.to_out.0",
    "attention.linear_proj_context": "attn.to_add_out",
    "dual_attention.linear_proj": "attn2.to_out.0",
    "mlp_context.linear_fc1": "ff_context.net.0.proj",
    "mlp_context.linear_fc2": "ff_context.net.2",
}
_DIT_MODULES = _MLP | {"modulation.linear": "norm1.linear", "attention.linear_proj": "attn1.to_out.0"}
# Query, key and value are one layer in Megatron-Core.
_JOINT_QKV = {
    "attention.linear_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attention.linear_qkv_context": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "dual_attention.linear_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}
_DIT_QKV = {"attention.linear_qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v")}
_JOINT_TENSORS = {
    "attention.qk_norm.query_weight": "attn.norm_q.weight",
    "attention.qk_norm.key_weight": "attn.norm_k.weight",
    "attention.qk_norm_context.query_weight": "attn.norm_added_q.weight",
    "attention.qk_norm_context.key_weight": "attn.norm_added_k.weight",
    "dual_attention.qk_norm.query_weight": "attn2.norm_q.weight",
    "dual_attention.qk_norm.key_weight": "attn2.norm_k.weight",
}
_RECURRENCE = {
    "recurrence.modulation.linear.weight": "recurrence.modulation.weight",
    "recurrence.modulation.linear.bias": "recurrence.modulation.bias",
    "recurrence.gate.weight": "recurrence.gate.token.weight",
    "recurrence.gate.conditioning_weight": "recurrence.gate.conditioning.weight",
    "recurrence.experts.down": "recurrence.experts.down.weight",
    "recurrence.experts.up": "recurrence.experts.up.weight",
    "recurrence.experts.weight": "recurrence.experts.weight",
}
_MODEL_MODULES = {
    Architecture.mmdit: {"modulation_out.linear": "norm_out.linear"},
    Architecture.dit: {"modulation_out.linear": "proj_out_1", "proj_out": "proj_out_2"},
}
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
        names: of the unsharded model's state; Megatron-Core's ``_extra_state`` entries are left out.

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
    is_dit = model.architecture is Architecture.dit
    block = _BLOCK.fullmatch(name)
    if block is not None:
        prefix = f"transformer_blocks.{block.group(1)}."
        return _block_rule(prefix, block.group(2), is_dit, model.num_attention_heads)
    conditioning = _CONDITIONING.fullmatch(name)
    if conditioning is not None:
        index, local = int(conditioning.group(1)), conditioning.group(2)
        blocks = range(model.num_layers) if model.shared_conditioning else [index]
        return Copies(tuple(f"transformer_blocks.{number}.norm1.emb.{local}" for number in blocks))
    module, _, parameter = name.rpartition(".")
    return Rule((f"{_MODEL_MODULES[model.architecture].get(module, module)}.{parameter}",))


def _block_rule(prefix: str, local: str, is_dit: bool, heads: int) -> Rule:
    module, _, parameter = local.rpartition(".")
    projections, modules = (_DIT_QKV, _DIT_MODULES) if is_dit else (_JOINT_QKV, _JOINT_MODULES)
    if local in _RECURRENCE:
        return Rule((f"{prefix}{'attn1' if is_dit else 'attn'}.{_RECURRENCE[local]}",))
    if module in projections:
        return QueryKeyValueRule(tuple(f"{prefix}{name}.{parameter}" for name in projections[module]), heads)
    if not is_dit and local in _JOINT_TENSORS:
        return Rule((prefix + _JOINT_TENSORS[local],))
    return Rule((f"{prefix}{modules[module]}.{parameter}",))
