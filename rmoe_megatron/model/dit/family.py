"""DiT without its layers: keys, FLOPs, parameters, names of weights."""

from typing import TYPE_CHECKING

from rmoe_megatron.config.model import ModelConfig, ModelDescription, Prediction
from rmoe_megatron.config.require import require
from rmoe_megatron.model.family import (
    TIMESTEP_CHANNELS,
    Family,
    WeightNames,
    attention_multiply_adds,
    stream_parameters,
    timestep_parameters,
)

TEXT_KEYS = ("text_length", "text_hidden_size", "pooled_size", "pos_embed_max_size")

if TYPE_CHECKING:
    from rmoe_megatron.model.diffusion_transformer import DiffusionTransformer


class DiTFamily(Family):
    """Vision tokens among themselves, conditioned on timestep and class through adaLN-Zero."""

    name = "DiT"
    weights = WeightNames(
        attention="attn1",
        modules={
            "mlp.linear_fc1": "ff.net.0.proj",
            "mlp.linear_fc2": "ff.net.2",
            "modulation.linear": "norm1.linear",
            "attention.linear_proj": "attn1.to_out.0",
        },
        projections={"attention.linear_qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v")},
        ends={"modulation_out.linear": "proj_out_1", "proj_out": "proj_out_2"},
    )

    def transformer(self) -> "type[DiffusionTransformer]":
        """Return :class:`DiT`."""
        from rmoe_megatron.model.dit.transformer import DiT

        return DiT

    def check(self, description: ModelDescription) -> None:
        """Check the keys of classes and timesteps; a DiT has no text, no QK norm and no second attention."""
        model = description.model
        require(
            model.num_classes > 0,
            f"model.num_classes must be greater than 0 for a DiT, it is {model.num_classes}.",
        )
        require(
            model.downscale_freq_shift in (0, 1),
            "model.downscale_freq_shift must be 1 (diffusers' DiT) or 0 (the original), it is "
            f"{model.downscale_freq_shift}.",
        )
        for name in (
            *TEXT_KEYS,
            "dual_attention_layers",
            "qk_norm",
            "rope_theta",
            "text_on_grid",
            "exclusive_attention",
        ):
            value = getattr(model, name)
            require(not value, f"model.{name} is {value}, but a DiT has none; leave it out (qk_norm: false).")
        require(
            description.diffusion.prediction is Prediction.velocity,
            "diffusion.prediction=sample is for MM-DiTs; a DiT predicts velocity or noise.",
        )

    def conditioning_multiply_adds(self, model: ModelConfig) -> float:
        """Return multiply-adds of the timestep's embedding; a class is looked up."""
        return (TIMESTEP_CHANNELS + model.hidden_size) * model.hidden_size

    def block_multiply_adds(self, model: ModelConfig, layer: int, vision: int) -> float:
        """Return multiply-adds of a block."""
        hidden = model.hidden_size
        return 12 * vision * hidden**2 + 6 * hidden**2 + attention_multiply_adds(vision, vision, hidden)

    def conditioning_parameters(self, model: ModelConfig) -> int:
        """Return the number of parameters that embed timestep and class, for all blocks or one copy for each."""
        copies = 1 if model.shared_conditioning else model.num_layers
        return copies * (timestep_parameters(model) + (model.num_classes + 1) * model.hidden_size)

    def block_parameters(self, model: ModelConfig, layer: int) -> int:
        """Return the number of parameters of a block."""
        return stream_parameters(model)
