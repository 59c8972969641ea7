"""The transformer blocks of SD3 and DiT as Megatron-Core layers.

Hidden states are one tensor [L + S, B, H], text first (L = 0 in DiT), so that Megatron-Core's pipeline schedule and
recomputation work as they are; :mod:`rmoe_megatron.model.sequence` says which part of it a rank has. Of TransformerBlock's arguments, ``context`` carries the conditioning and
``context_mask`` the samples' random keys.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, get_transformer_layer_offset
from torch import Tensor

from rmoe_megatron.config.model import LoraConfig, RecurrenceConfig
from rmoe_megatron.model.modulation import Modulation, modulate
from rmoe_megatron.model.sequence import num_shards, padded_length


@dataclass
class BlockSubmodules:
    """Parts of a block; the optional ones are not in every block."""

    attention: ModuleSpec
    mlp: ModuleSpec
    dual_attention: ModuleSpec | None = None
    recurrence: ModuleSpec | None = None
    lora: ModuleSpec | None = None


@dataclass(frozen=True)
class BlockSettings:
    """What Megatron-Core's TransformerConfig does not say about a block.

    Attributes:
        seed: of the initial weights; with the layer's number it determines them whatever the layout.
        text_length: number L of text tokens at the start of the sequence.
        context_pre_only: the last block of SD3, whose text stream ends in the attention.
        recompute: keep the block's input alone for the backward pass and compute the rest again.
    """

    qk_norm: bool
    mlp_norm_eps: float
    seed: int
    text_length: int = 0
    context_pre_only: bool = False
    recompute: bool = False
    recurrence: RecurrenceConfig | None = None
    lora: LoraConfig | None = None


class Block(MegatronModule, BaseTransformerLayer):
    """What both blocks share: their place in the model, and attention of vision tokens with what is added to it."""

    attention: MegatronModule
    mlp: MegatronModule

    def __init__(
        self,
        config: TransformerConfig,
        submodules: BlockSubmodules,
        layer_number: int,
        settings: BlockSettings,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage, groups.pp.rank())
        self.settings = settings
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed * 100_003 + self.layer_number)
            self.build_base(submodules)
            # Built last: a block with additions starts with the same base weights as one without.
            self.recurrence = self.lora = None
            fresh = copy.copy(config)
            fresh.perform_initialization = True  # the base may come from a checkpoint, additions start here
            if submodules.recurrence is not None:
                self.recurrence = build_module(
                    submodules.recurrence,
                    config=fresh,
                    recurrence=settings.recurrence,
                    layer_number=self.layer_number,
                    pg_collection=groups,
                )
            if submodules.lora is not None:
                self.lora = build_module(
                    submodules.lora, config=fresh, lora=settings.lora, pg_collection=groups
                )

    def build_base(self, submodules: BlockSubmodules) -> None:
        """Build the block without recurrence and LoRA."""
        raise NotImplementedError

    def transform(self, hidden_states: Tensor, context: Tensor, keys: Tensor) -> Tensor:
        """Return the hidden states after the block."""
        raise NotImplementedError

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, context: Tensor, context_mask: Tensor, **_: object
    ) -> tuple[Tensor, Tensor]:
        """Apply the block and hand ``context`` on, as TransformerBlock wants it; see :meth:`transform`."""
        inputs = (hidden_states, context, context_mask)
        if self.settings.recompute and self.training:
            return checkpoint(self.transform, False, *inputs), context
        return self.transform(*inputs), context

    def build_mlp(self, submodules: BlockSubmodules) -> MegatronModule:
        """Build the MLP of one stream."""
        return build_module(submodules.mlp, config=self.config, ffn_hidden_size=self.config.ffn_hidden_size)

    def attend(
        self, vision: Tensor, text: Tensor | None, conditioning: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention output of modulated vision tokens [S, B, H] and text tokens [L, B, H]."""
        if self.recurrence is not None:
            return self.recurrence(self.attention, vision, text, conditioning, keys)
        vision_qkv = self.attention.project_vision(vision)
        if self.lora is not None:
            vision_qkv = vision_qkv + self.lora(vision)
        return self.attention(vision_qkv, None if text is None else self.attention.project_text(text))

    def feed_forward(
        self, mlp: MegatronModule, hidden_states: Tensor, shift: Tensor, scale: Tensor, gate: Tensor
    ) -> Tensor:
        """Return hidden_states [S, B, H] after the modulated MLP and its residual connection."""
        output, bias = mlp(modulate(hidden_states, shift, scale, self.settings.mlp_norm_eps))
        return hidden_states.addcmul(gate, output + bias)


class JointBlock(Block):
    """Joint attention and MLP of the vision and text streams with adaLN-Zero, as in SD3.

    With ``dual_attention`` the vision tokens also attend among themselves, as in SD3.5-medium's first blocks.
    """

    def build_base(self, submodules: BlockSubmodules) -> None:
        """Build the block without recurrence and LoRA."""
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

    def transform(self, hidden_states: Tensor, context: Tensor, keys: Tensor) -> Tensor:
        """Apply the block.

        Args:
            hidden_states: this rank's tokens [(L_pad + S) / (CP TP), B, H], text first.
            context: conditioning [1, B, H], after SiLU.
            keys: of the counter-based random numbers, int64 [B].
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
        attended, text_attended = self.attend(vision_input, text_input, context, keys)
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


class DiTBlock(Block):
    """Self-attention and MLP with adaLN-Zero, as in DiT (Peebles and Xie, 2022)."""

    def build_base(self, submodules: BlockSubmodules) -> None:
        """Build the block without recurrence and LoRA."""
        self.modulation = Modulation(self.config, num_vectors=6)
        self.attention = build_module(
            submodules.attention,
            config=self.config,
            layer_number=self.layer_number,
            qk_norm=self.settings.qk_norm,
        )
        self.mlp = self.build_mlp(submodules)

    def transform(self, hidden_states: Tensor, context: Tensor, keys: Tensor) -> Tensor:
        """Apply the block.

        Args:
            hidden_states: this rank's tokens [S / (CP TP), B, H].
            context: conditioning after SiLU, [1, B, H] for all blocks or [num_layers, B, H], one for each.
            keys: of the counter-based random numbers, int64 [B].
        """
        conditioning = (
            context if context.shape[0] == 1 else context[self.layer_number - 1 : self.layer_number]
        )
        shift, scale, gate, *modulation_mlp = self.modulation(conditioning)
        vision_input = modulate(hidden_states, shift, scale)
        attended = self.attend(vision_input, None, conditioning, keys)[0]
        hidden_states = hidden_states.addcmul(gate, attended)
        return self.feed_forward(self.mlp, hidden_states, *modulation_mlp)
