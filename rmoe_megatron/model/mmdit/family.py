"""MM-DiT without its layers: keys, FLOPs, parameters, names of weights."""

from typing import TYPE_CHECKING

from rmoe_megatron.config.model import ModelConfig, ModelDescription
from rmoe_megatron.config.require import require
from rmoe_megatron.model.family import (
    TIMESTEP_CHANNELS,
    Family,
    WeightNames,
    attention_multiply_adds,
    attention_parameters,
    linear_parameters,
    qk_norm_parameters,
    stream_parameters,
    timestep_parameters,
)

if TYPE_CHECKING:
    from rmoe_megatron.model.diffusion_transformer import DiffusionTransformer


def _check_attention(model: ModelConfig) -> None:
    head_dim, patches = model.hidden_size // model.num_attention_heads, model.sample_size // model.patch_size
    require(
        model.rope_theta is None or head_dim % 4 == 0,
        f"model.rope_theta turns pairs of a head's dimensions for two axes, so hidden_size / num_attention_heads ({head_dim}) "
        "must be a multiple of 4.",
    )
    require(
        model.rope_theta is None or not model.dual_attention_layers,
        "model.rope_theta is not for blocks with a second attention; set dual_attention_layers=[] or rope_theta=null.",
    )
    require(
        not model.exclusive_attention or not model.dual_attention_layers,
        "model.exclusive_attention is not for blocks with a second attention; set dual_attention_layers=[].",
    )
    require(
        not model.text_on_grid or (model.rope_theta is not None and model.text_length >= patches**2),
        f"model.text_on_grid needs rope_theta and a text token or more for each of the image's {patches} x {patches} patches, but "
        f"rope_theta is {model.rope_theta} and text_length {model.text_length}.",
    )


class MMDiTFamily(Family):
    """Vision and text tokens in one attention, each stream with its own weights."""

    name = "MM-DiT"
    weights = WeightNames(
        attention="attn",
        modules={
            "mlp.linear_fc1": "ff.net.0.proj",
            "mlp.linear_fc2": "ff.net.2",
            "modulation.linear": "norm1.linear",
            "modulation_context.linear": "norm1_context.linear",
            "attention.linear_proj": "attn.to_out.0",
            "attention.linear_proj_context": "attn.to_add_out",
            "dual_attention.linear_proj": "attn2.to_out.0",
            "mlp_context.linear_fc1": "ff_context.net.0.proj",
            "mlp_context.linear_fc2": "ff_context.net.2",
        },
        projections={
            "attention.linear_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "attention.linear_qkv_context": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "dual_attention.linear_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        },
        tensors={
            "attention.qk_norm.query_weight": "attn.norm_q.weight",
            "attention.qk_norm.key_weight": "attn.norm_k.weight",
            "attention.qk_norm_context.query_weight": "attn.norm_added_q.weight",
            "attention.qk_norm_context.key_weight": "attn.norm_added_k.weight",
            "dual_attention.qk_norm.query_weight": "attn2.norm_q.weight",
            "dual_attention.qk_norm.key_weight": "attn2.norm_k.weight",
        },
        ends={"modulation_out.linear": "norm_out.linear"},
    )

    def transformer(self) -> "type[DiffusionTransformer]":
        """Return :class:`MMDiT`."""
        from rmoe_megatron.model.mmdit.transformer import MMDiT

        return MMDiT

    def check(self, description: ModelDescription) -> None:
        """Check the keys of text and positions; an MM-DiT has no classes and no learned variance."""
        model = description.model
        for name in ("text_length", "text_hidden_size", "pooled_size", "pos_embed_max_size"):
            value = getattr(model, name)
            require(value > 0, f"model.{name} must be greater than 0 for an MM-DiT, it is {value}.")
        for name in ("num_classes", "learned_sigma"):
            value = getattr(model, name)
            require(not value, f"model.{name} is {value}, but an MM-DiT has none; set architecture=dit.")
        for name in ("mlp_norm_eps", "downscale_freq_shift", "timestep_scale"):
            value = getattr(model, name)
            require(
                value == getattr(ModelConfig, name),
                f"model.{name} is {value}, but an MM-DiT has it fixed; leave it out.",
            )
        patches = model.sample_size // model.patch_size
        require(
            model.pos_embed_max_size >= patches,
            f"model.pos_embed_max_size ({model.pos_embed_max_size}) must be at least sample_size / patch_size "
            f"({patches}).",
        )
        _check_attention(model)

    def conditioning_multiply_adds(self, model: ModelConfig) -> float:
        """Return multiply-adds of the embeddings of timestep, pooled text and text tokens."""
        hidden = model.hidden_size
        timestep, pooled = (TIMESTEP_CHANNELS + hidden) * hidden, (model.pooled_size + hidden) * hidden
        return timestep + pooled + model.text_length * model.text_hidden_size * hidden

    def block_multiply_adds(self, model: ModelConfig, layer: int, vision: int) -> float:
        """Return multiply-adds of a joint block; the last one's text stream ends in the attention."""
        text, hidden = model.text_length, model.hidden_size
        tokens = vision + text
        block = 12 * tokens * hidden**2 + 12 * hidden**2 + attention_multiply_adds(tokens, tokens, hidden)
        if layer in model.dual_attention_layers:
            block += 4 * vision * hidden**2 + 3 * hidden**2 + attention_multiply_adds(vision, vision, hidden)
        if layer == model.num_layers - 1:
            block -= 9 * text * hidden**2 + 4 * hidden**2 + attention_multiply_adds(text, tokens, hidden)
        return block

    def conditioning_parameters(self, model: ModelConfig) -> int:
        """Return the number of parameters of the embeddings of timestep, pooled text and text tokens."""
        hidden = model.hidden_size
        pooled = linear_parameters(model.pooled_size, hidden) + linear_parameters(hidden, hidden)
        return timestep_parameters(model) + pooled + linear_parameters(model.text_hidden_size, hidden)

    def block_parameters(self, model: ModelConfig, layer: int) -> int:
        """Return the number of parameters of a joint block."""
        hidden, stream = model.hidden_size, stream_parameters(model)
        dual = 0
        if layer in model.dual_attention_layers:
            dual = attention_parameters(model) + 3 * linear_parameters(hidden, hidden)
        if layer < model.num_layers - 1:
            return 2 * stream + dual
        last_text = linear_parameters(hidden, 3 * hidden) + qk_norm_parameters(model)
        return stream + dual + last_text + linear_parameters(hidden, 2 * hidden)
