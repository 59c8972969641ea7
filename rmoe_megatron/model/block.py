"""What the blocks of all families share, as Megatron-Core layers.

Hidden states are one tensor [L + S, B, H], text first (L = 0 in DiT), so that Megatron-Core's pipeline schedule and
recomputation work as they are; :mod:`rmoe_megatron.model.sequence` says which part of it a rank has. Of TransformerBlock's
arguments, ``context`` carries the conditioning, ``context_mask`` the samples' random keys, and ``rotary_pos_emb`` what of rotary
positions a rank needs.
"""

import copy
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, get_transformer_layer_offset
from torch import Tensor

from rmoe_megatron.distributed.device import compiled
from rmoe_megatron.model.attention import Positions
from rmoe_megatron.model.modulation import modulate


@dataclass
class BlockSubmodules:
    """Parts of a block; the optional ones are not in every block."""

    attention: ModuleSpec
    mlp: ModuleSpec
    dual_attention: ModuleSpec | None = None
    adapter: ModuleSpec | None = None


@dataclass(frozen=True)
class BlockSettings:
    """What Megatron-Core's TransformerConfig does not say about a block.

    Attributes:
        seed: determines the initial weights, together with the layer's number, whatever the layout.
        text_length: number L of text tokens at the start of the sequence.
        context_pre_only: the last block of SD3, whose text stream ends in the attention.
        recompute: keep the block's input alone for the backward pass and compute the rest again.
        exclusive_attention: heads' outputs lose their part along the token's own value.
        compile: train through torch.compile, a block without an adapter as one graph; evaluation stays as it is.
        adapter: name of the module that is added to the attention, after which its parameters are called.
    """

    qk_norm: bool
    mlp_norm_eps: float
    seed: int
    text_length: int = 0
    context_pre_only: bool = False
    recompute: bool = False
    compile: bool = False
    exclusive_attention: bool = False
    adapter: str | None = None


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
            self.attention.exclusive = settings.exclusive_attention
            # Built last: a block with an adapter starts with the same base weights as one without.
            if submodules.adapter is not None:
                fresh = copy.copy(config)
                fresh.perform_initialization = (
                    True  # the base may come from a checkpoint, adapters start here
                )
                assert settings.adapter is not None
                adapter = build_module(
                    submodules.adapter, config=fresh, layer_number=self.layer_number, pg_collection=groups
                )
                self.add_module(settings.adapter, adapter)
        self.compiled_transform = (
            compiled(self.transform, fullgraph=self.adapter is None) if settings.compile else self.transform
        )

    @property
    def adapter(self) -> MegatronModule | None:
        """Return what is added to the attention."""
        return getattr(self, self.settings.adapter) if self.settings.adapter else None

    def build_base(self, submodules: BlockSubmodules) -> None:
        """Build the block without what is added to it."""
        raise NotImplementedError

    def transform(
        self,
        hidden_states: Tensor,
        context: Tensor,
        rng_keys: Tensor,
        positions: Positions | None = None,
        latent_steps: int | None = None,
    ) -> Tensor:
        """Return the hidden states after the block."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor,
        context_mask: Tensor,
        rotary_pos_emb: Positions | None = None,
        latent_steps: int | None = None,
        **_: object,
    ) -> tuple[Tensor, Tensor]:
        """Apply the block and hand ``context`` on, as TransformerBlock wants it; see :meth:`transform`."""
        inputs = (hidden_states, context, context_mask)
        if self.settings.recompute and self.training:
            again = partial(self.transform, positions=rotary_pos_emb, latent_steps=latent_steps)
            return checkpoint(again, False, *inputs), context
        transform = self.compiled_transform if self.training else self.transform
        return transform(*inputs, rotary_pos_emb, latent_steps), context

    def build_mlp(self, submodules: BlockSubmodules) -> MegatronModule:
        """Build the MLP of one stream."""
        return build_module(submodules.mlp, config=self.config, ffn_hidden_size=self.config.ffn_hidden_size)

    def attend(
        self,
        vision: Tensor,
        text: Tensor | None,
        conditioning: Tensor,
        rng_keys: Tensor,
        positions: Positions | None = None,
        latent_steps: int | None = None,
        unmodulated: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention output of modulated vision tokens [S, B, H] and text tokens [L, B, H].

        Args:
            unmodulated: the vision tokens before normalisation and modulation, for gates that ask for them.
        """
        if self.adapter is not None:
            return self.adapter(
                self.attention, vision, text, conditioning, rng_keys, positions, latent_steps, unmodulated
            )
        vision_qkv = self.attention.project_vision(vision)
        text_qkv = None if text is None else self.attention.project_text(text, positions)
        return self.attention(vision_qkv, text_qkv, positions)

    def feed_forward(
        self, mlp: MegatronModule, hidden_states: Tensor, shift: Tensor, scale: Tensor, gate: Tensor
    ) -> Tensor:
        """Return hidden_states [S, B, H] after the modulated MLP and its residual connection."""
        output, bias = mlp(modulate(hidden_states, shift, scale, self.settings.mlp_norm_eps))
        return hidden_states.addcmul(gate, output if bias is None else output + bias)
