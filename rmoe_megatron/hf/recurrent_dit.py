"""DiT with recursive sparse experts in the self-attention of chosen blocks, as a diffusers model.

This file and those it imports need diffusers alone: an exported folder can carry them (``--remote-code``).
"""

from typing import Any

from diffusers import DiTTransformer2DModel, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor

from rmoe_megatron.hf.carried_code import CarriesCode

from .recurrence import Recurrence

# DiffusionPipeline.from_pretrained loads a class of another library only if that module also names ModelMixin.
__all__ = ["ModelMixin", "RecurrentDiTTransformer2DModel"]


class RecurrentAttnProcessor:
    """Runs the recurrence of an attention layer in place of diffusers' AttnProcessor2_0."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, temb: Tensor, unmodulated: Tensor | None = None, **_: Any
    ) -> Tensor:
        """Return what AttnProcessor2_0 returns; ``temb`` [B, H] is the conditioning vector."""
        return attn.recurrence(attn, hidden_states, None, temb, unmodulated=unmodulated)[0]


class RecurrentDiTBlock(BasicTransformerBlock):
    """DiT's block whose self-attention also sees the conditioning vector, for the gate and the step modulation."""

    def __init__(self, *args: Any, recurrence: Recurrence, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attn1.recurrence = recurrence
        self.attn1.set_processor(RecurrentAttnProcessor())

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Apply the block; see diffusers' BasicTransformerBlock."""
        temb = self.norm1.emb(timestep, class_labels, hidden_dtype=hidden_states.dtype)
        return super().forward(
            hidden_states,
            timestep=timestep,
            class_labels=class_labels,
            cross_attention_kwargs={
                **(cross_attention_kwargs or {}),
                "temb": temb,
                "unmodulated": hidden_states,
            },
        )


class RecurrentDiTTransformer2DModel(CarriesCode, DiTTransformer2DModel):
    """diffusers' DiTTransformer2DModel with recurrence in the blocks ``recurrence["layers"]``.

    Args:
        recurrence: keys ``layers`` (block numbers from 0), ``num_modules``, ``steps``, ``rank`` (None: full rank),
            ``modulation`` and ``gate_inputs``; None has none.
        downscale_freq_shift: of the timestep features. 1: those of DiTTransformer2DModel, which has this value fixed;
            0: those of the original DiT.
        timestep_scale: times the timestep, before its features; 1 in DiTTransformer2DModel, 0.001 in SiT, whose time is
            from 0 to 1. The other arguments are those of DiTTransformer2DModel.
    """

    _no_split_modules = ["BasicTransformerBlock", "RecurrentDiTBlock"]
    _repeated_blocks = ["BasicTransformerBlock", "RecurrentDiTBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "gate"]
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_zero",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
        recurrence: dict[str, Any] | None = None,
        downscale_freq_shift: float = 1.0,
        timestep_scale: float = 1.0,
    ) -> None:
        block = {
            "dropout": dropout,
            "attention_bias": attention_bias,
            "activation_fn": activation_fn,
            "num_embeds_ada_norm": num_embeds_ada_norm,
            "upcast_attention": upcast_attention,
            "norm_type": norm_type,
            "norm_elementwise_affine": norm_elementwise_affine,
            "norm_eps": norm_eps,
        }
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            norm_num_groups=norm_num_groups,
            sample_size=sample_size,
            patch_size=patch_size,
            **block,
        )
        settings = dict(recurrence or {"layers": []})
        for layer in settings.pop("layers"):
            self.transformer_blocks[layer] = RecurrentDiTBlock(
                self.inner_dim,
                num_attention_heads,
                attention_head_dim,
                recurrence=Recurrence(self.inner_dim, **settings),
                **block,
            )
        for transformer_block in self.transformer_blocks:
            transformer_block.norm1.emb.time_proj.downscale_freq_shift = downscale_freq_shift
            transformer_block.norm1.emb.time_proj.scale = timestep_scale
