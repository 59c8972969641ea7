"""SD3's block: joint attention of vision and text with adaLN-Zero."""

from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor

from rmoe_megatron.config.model import ModelConfig
from rmoe_megatron.model.attention import JointAttention, Positions, SelfAttention
from rmoe_megatron.model.block import Block, BlockSettings, BlockSubmodules
from rmoe_megatron.model.modulation import Modulation, modulate
from rmoe_megatron.model.precision.layers import Layers
from rmoe_megatron.model.sequence import num_shards, padded_length


def joint_block(model: ModelConfig, layer: int, settings: BlockSettings, layers: Layers) -> ModuleSpec:
    """Return the spec of block ``layer``; in the last one text gives keys and values but receives no output."""
    dual = ModuleSpec(module=SelfAttention, submodules=layers.attention())
    submodules = BlockSubmodules(
        attention=ModuleSpec(module=JointAttention, submodules=layers.attention()),
        mlp=layers.mlp(),
        dual_attention=dual if layer in model.dual_attention_layers else None,
    )
    settings = replace(settings, context_pre_only=layer == model.num_layers - 1)
    return ModuleSpec(module=JointBlock, params={"settings": settings}, submodules=submodules)


class JointBlock(Block):
    """Joint attention and MLP of the vision and text streams with adaLN-Zero, as in SD3.

    With ``dual_attention`` the vision tokens also attend among themselves, as in SD3.5-medium's first blocks.
    """

    def build_base(self, submodules: BlockSubmodules) -> None:
        """Build the block without what is added to it."""
        last, has_dual = self.settings.context_pre_only, submodules.dual_attention is not None
        self.modulation = Modulation(self.config, num_vectors=9 if has_dual else 6)
        self.modulation_context = Modulation(self.config, num_vectors=2 if last else 6)
        arguments: dict[str, Any] = {
            "config": self.config,
            "layer_number": self.layer_number,
            "qk_norm": self.settings.qk_norm,
        }
        self.attention = build_module(
            submodules.attention,
            context_pre_only=last,
            text_length=self.settings.text_length,
            **arguments,
        )
        self.mlp = self.build_mlp(submodules)
        self.mlp_context = None if last else self.build_mlp(submodules)
        self.dual_attention = build_module(submodules.dual_attention, **arguments) if has_dual else None

    def transform(
        self,
        hidden_states: Tensor,
        context: Tensor,
        rng_keys: Tensor,
        positions: Positions | None = None,
        latent_steps: int | None = None,
    ) -> Tensor:
        """Apply the block.

        Args:
            hidden_states: this rank's tokens [(L_pad + S) / (CP TP), B, H], text first.
            context: conditioning [1, B, H], after SiLU.
            rng_keys: int64 [B], one key of the counter-based random numbers for every sample.
            positions: the rotary positions, for a model that has them.
            latent_steps: how many steps its recurrence takes; None takes the model's number.
        """
        shards = num_shards(self.config)
        text, vision = hidden_states.tensor_split(
            [padded_length(self.settings.text_length, shards) // shards]
        )
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *dual = self.modulation(context)
        if self.mlp_context is None:
            text_scale, text_shift = self.modulation_context(context)
        else:
            text_shift, text_scale, text_gate, *text_modulation_mlp = self.modulation_context(context)

        vision_input, text_input = modulate(vision, shift, scale), modulate(text, text_shift, text_scale)
        attended, text_attended = self.attend(
            vision_input, text_input, context, rng_keys, positions, latent_steps, vision
        )
        if self.dual_attention is not None:
            dual_shift, dual_scale, dual_gate = dual
            dual_input = modulate(vision, dual_shift, dual_scale)
            dual_attended = self.dual_attention(self.dual_attention.project_vision(dual_input))[0]
        vision = vision.addcmul(gate, attended)
        if self.dual_attention is not None:
            vision = vision.addcmul(dual_gate, dual_attended)
        vision = self.feed_forward(self.mlp, vision, shift_mlp, scale_mlp, gate_mlp)
        if self.mlp_context is not None:
            assert text_attended is not None
            text = text.addcmul(text_gate, text_attended)
            text = self.feed_forward(self.mlp_context, text, *text_modulation_mlp)
        return torch.cat((text, vision))
