"""DiT's block: self-attention and MLP with adaLN-Zero."""

from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor

from rmoe_megatron.config.model import ModelConfig
from rmoe_megatron.model.attention import Positions, SelfAttention
from rmoe_megatron.model.block import Block, BlockSettings, BlockSubmodules
from rmoe_megatron.model.modulation import Modulation, modulate
from rmoe_megatron.model.precision.layers import Layers


def dit_block(model: ModelConfig, layer: int, settings: BlockSettings, layers: Layers) -> ModuleSpec:
    """Return the spec of block ``layer``; all are alike."""
    attention = ModuleSpec(module=SelfAttention, submodules=layers.attention())
    submodules = BlockSubmodules(attention=attention, mlp=layers.mlp())
    return ModuleSpec(module=DiTBlock, params={"settings": settings}, submodules=submodules)


class DiTBlock(Block):
    """Self-attention and MLP with adaLN-Zero, as in DiT (Peebles and Xie, 2022)."""

    def build_base(self, submodules: BlockSubmodules) -> None:
        """Build the block without what is added to it."""
        self.modulation = Modulation(self.config, num_vectors=6)
        self.attention = build_module(
            submodules.attention,
            config=self.config,
            layer_number=self.layer_number,
            qk_norm=self.settings.qk_norm,
        )
        self.mlp = self.build_mlp(submodules)

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
            hidden_states: this rank's tokens [S / (CP TP), B, H].
            context: conditioning after SiLU, [1, B, H] for all blocks or [num_layers, B, H], one for each.
            rng_keys: int64 [B], one key of the counter-based random numbers for every sample.
            positions: the rotary positions, for a model that has them.
            latent_steps: how many steps its recurrence takes; None takes the model's number.
        """
        conditioning = (
            context if context.shape[0] == 1 else context[self.layer_number - 1 : self.layer_number]
        )
        shift, scale, gate, *modulation_mlp = self.modulation(conditioning)
        vision_input = modulate(hidden_states, shift, scale)
        attended = self.attend(
            vision_input, None, conditioning, rng_keys, positions, latent_steps, hidden_states
        )[0]
        hidden_states = hidden_states.addcmul(gate, attended)
        return self.feed_forward(self.mlp, hidden_states, *modulation_mlp)
