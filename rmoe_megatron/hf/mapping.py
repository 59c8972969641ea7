"""Names and layouts of weights: the Megatron-Core model's on one side, diffusers' on the other."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rmoe_megatron.config.schema import ModelConfig, RecurrenceConfig

# (name in the Megatron-Core model, name in diffusers) of modules that hold `weight` and `bias`.
BLOCK_MODULES = {
    "modulation.linear": "norm1.linear",
    "modulation_context.linear": "norm1_context.linear",
    "attention.linear_proj": "attn.to_out.0",
    "attention.linear_proj_context": "attn.to_add_out",
    "mlp.linear_fc1": "ff.net.0.proj",
    "mlp.linear_fc2": "ff.net.2",
    "mlp_context.linear_fc1": "ff_context.net.0.proj",
    "mlp_context.linear_fc2": "ff_context.net.2",
    "recurrence.modulation.linear": "attn.recurrence.modulation",
}
BLOCK_TENSORS = {
    "attention.qk_norm.query_weight": "attn.norm_q.weight",
    "attention.qk_norm.key_weight": "attn.norm_k.weight",
    "attention.qk_norm_context.query_weight": "attn.norm_added_q.weight",
    "attention.qk_norm_context.key_weight": "attn.norm_added_k.weight",
    "recurrence.gate.weight": "attn.recurrence.gate.token.weight",
    "recurrence.gate.conditioning_weight": "attn.recurrence.gate.conditioning.weight",
    "recurrence.experts.down": "attn.recurrence.experts.down.weight",
    "recurrence.experts.up": "attn.recurrence.experts.up.weight",
    "recurrence.experts.weight": "attn.recurrence.experts.weight",
}
# Query, key and value are one layer in Megatron-Core, with rows ordered (head, q|k|v, head_dim).
BLOCK_QKV = {
    "attention.linear_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attention.linear_qkv_context": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
MODEL_MODULES = {"modulation_out.linear": "norm_out.linear"}
_BLOCK = re.compile(r"transformer\.layers\.(\d+)\.(.+)")


def to_diffusers(state_dict: Mapping[str, Any], num_attention_heads: int) -> dict[str, Tensor]:
    """Rename and split the whole model's weights; shapes are those of an unsharded model.

    Raises:
        KeyError: a weight has no counterpart.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if name.endswith("_extra_state"):
            continue
        block = _BLOCK.fullmatch(name)
        if block is None:
            module, _, parameter = name.rpartition(".")
            converted[f"{MODEL_MODULES.get(module, module)}.{parameter}"] = tensor
            continue
        prefix, local = f"transformer_blocks.{block.group(1)}.", block.group(2)
        module, _, parameter = local.rpartition(".")
        if local in BLOCK_TENSORS:
            converted[prefix + BLOCK_TENSORS[local]] = tensor
        elif module in BLOCK_QKV:
            split = tensor.unflatten(0, (num_attention_heads, 3, -1)).unbind(dim=1)
            for target, part in zip(BLOCK_QKV[module], split, strict=True):
                converted[f"{prefix}{target}.{parameter}"] = part.flatten(0, 1).contiguous()
        else:
            converted[f"{prefix}{BLOCK_MODULES[module]}.{parameter}"] = tensor
    return converted


def transformer_arguments(model: ModelConfig, recurrence: RecurrenceConfig | None) -> dict[str, Any]:
    """Return the arguments of RecurrentSD3Transformer2DModel for a configuration."""
    return {
        "sample_size": model.sample_size,
        "patch_size": model.patch_size,
        "in_channels": model.in_channels,
        "out_channels": model.in_channels,
        "num_layers": model.num_layers,
        "attention_head_dim": model.hidden_size // model.num_attention_heads,
        "num_attention_heads": model.num_attention_heads,
        "joint_attention_dim": model.text_hidden_size,
        "caption_projection_dim": model.hidden_size,
        "pooled_projection_dim": model.pooled_size,
        "pos_embed_max_size": model.pos_embed_max_size,
        "qk_norm": "rms_norm" if model.qk_norm else None,
        "recurrence": None
        if recurrence is None
        else {
            "layers": list(recurrence.layers),
            "num_modules": recurrence.num_modules,
            "steps": recurrence.steps,
            "rank": recurrence.rank,
            "modulation": recurrence.modulation,
            "gate_inputs": list(recurrence.gate_inputs),
        },
    }
