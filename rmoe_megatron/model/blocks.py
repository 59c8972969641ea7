"""SD3's dual-stream transformer block as a Megatron-Core layer."""

from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, get_transformer_layer_offset
from torch import Tensor

from rmoe_megatron.config.schema import RecurrenceConfig
from rmoe_megatron.model.modulation import Modulation, modulate


@dataclass
class JointBlockSubmodules:
    """Parts of a :class:`JointBlock`; ``recurrence`` is None in a plain SD3 block."""

    attention: ModuleSpec
    mlp: ModuleSpec
    recurrence: ModuleSpec | None = None


class JointBlock(MegatronModule, BaseTransformerLayer):
    """Joint attention and MLP of the vision and text streams with adaLN-Zero, as in SD3.

    Hidden states of both streams are one tensor [L + S, B, H], text first, so that Megatron-Core's pipeline schedule
    and recomputation work as they are. Of TransformerBlock's arguments, ``context`` carries the conditioning vector
    and ``context_mask`` the samples' random keys.

    Args:
        text_length: number L of text tokens at the start of the sequence.
        context_pre_only: the last block of SD3, whose text stream ends in the attention.
        seed: of the initial weights; with the layer's number it determines them whatever the layout.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: JointBlockSubmodules,
        layer_number: int,
        text_length: int,
        context_pre_only: bool,
        qk_norm: bool,
        seed: int,
        recurrence: RecurrenceConfig | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage, groups.pp.rank())
        self.text_length = text_length
        self.context_pre_only = context_pre_only
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 100_003 + self.layer_number)
            self.modulation = Modulation(config, num_vectors=6)
            self.modulation_context = Modulation(config, num_vectors=2 if context_pre_only else 6)
            self.attention = build_module(
                submodules.attention,
                config=config,
                layer_number=self.layer_number,
                context_pre_only=context_pre_only,
                qk_norm=qk_norm,
            )
            self.mlp = build_module(submodules.mlp, config=config, ffn_hidden_size=config.ffn_hidden_size)
            self.mlp_context = None
            if not context_pre_only:
                self.mlp_context = build_module(
                    submodules.mlp, config=config, ffn_hidden_size=config.ffn_hidden_size
                )
            # Built last: a block with recurrence starts with the same base weights as one without.
            self.recurrence = None
            if submodules.recurrence is not None:
                self.recurrence = build_module(
                    submodules.recurrence,
                    config=config,
                    recurrence=recurrence,
                    layer_number=self.layer_number,
                    pg_collection=groups,
                )

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        context: Tensor,
        context_mask: Tensor,
        **_: object,
    ) -> tuple[Tensor, Tensor]:
        """Apply the block.

        Args:
            hidden_states: [L + S, B, H], text first.
            context: conditioning [1, B, H], after SiLU.
            context_mask: keys of the counter-based random numbers, int64 [B].

        Returns:
            The new hidden states and ``context`` unchanged.
        """
        text, vision = hidden_states.split([self.text_length, hidden_states.shape[0] - self.text_length])
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(context)
        if self.context_pre_only:
            text_scale, text_shift = self.modulation_context(context)
        else:
            text_shift, text_scale, text_gate, *text_modulation_mlp = self.modulation_context(context)

        vision_input = modulate(vision, shift, scale)
        text_input = modulate(text, text_shift, text_scale)
        if self.recurrence is None:
            attended, text_attended = self.attention(
                self.attention.project_vision(vision_input), self.attention.project_text(text_input)
            )
        else:
            attended, text_attended = self.recurrence(
                self.attention, vision_input, text_input, context, context_mask
            )
        vision = vision.addcmul(gate, attended)
        vision = self._feed_forward(self.mlp, vision, shift_mlp, scale_mlp, gate_mlp)
        if not self.context_pre_only:
            text = text.addcmul(text_gate, text_attended)
            text = self._feed_forward(self.mlp_context, text, *text_modulation_mlp)
        return torch.cat((text, vision)), context

    @staticmethod
    def _feed_forward(
        mlp: MegatronModule, hidden_states: Tensor, shift: Tensor, scale: Tensor, gate: Tensor
    ) -> Tensor:
        output, bias = mlp(modulate(hidden_states, shift, scale))
        return hidden_states.addcmul(gate, output + bias)
