"""MM-DiT: Stable Diffusion 3's transformer, hosted in Megatron-Core."""

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings, PatchEmbed
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from rmoe_megatron.config.schema import RunConfig
from rmoe_megatron.model.layer_specs import block_spec
from rmoe_megatron.model.modulation import Modulation, modulate
from rmoe_megatron.model.transformer_config import transformer_config


class MMDiT(MegatronModule):
    """Predicts the velocity of noisy latents from text and timestep.

    Embeddings are diffusers' own modules. Every pipeline stage computes the conditioning vector itself; the first
    embeds, the last projects out.

    Args:
        config: a validated run configuration.
        pre_process: this is the first pipeline stage.
        post_process: this is the last pipeline stage.
    """

    def __init__(self, config: RunConfig, pre_process: bool = True, post_process: bool = True) -> None:
        transformer = transformer_config(config)
        super().__init__(config=transformer)
        model, dtype = config.model, transformer.params_dtype
        self.patch_size, self.in_channels = model.patch_size, model.in_channels
        self.pre_process, self.post_process = pre_process, post_process
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        groups = ProcessGroupCollection.use_mpu_process_groups()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed * 100_003)
            self.time_text_embed = CombinedTimestepTextProjEmbeddings(
                embedding_dim=model.hidden_size, pooled_projection_dim=model.pooled_size
            ).to(dtype)
            if pre_process:
                self.pos_embed = PatchEmbed(
                    height=model.sample_size,
                    width=model.sample_size,
                    patch_size=model.patch_size,
                    in_channels=model.in_channels,
                    embed_dim=model.hidden_size,
                    pos_embed_max_size=model.pos_embed_max_size,
                ).to(dtype)
                self.context_embedder = nn.Linear(model.text_hidden_size, model.hidden_size, dtype=dtype)
            self.transformer = TransformerBlock(
                transformer,
                block_spec(config, transformer, groups.pp.rank()),
                pre_process=pre_process,
                post_process=post_process,
                pg_collection=groups,
            )
            if post_process:
                self.modulation_out = Modulation(transformer, num_vectors=2)
                self.proj_out = nn.Linear(
                    model.hidden_size, model.patch_size**2 * model.in_channels, dtype=dtype
                )
                # With adaLN-Zero the untrained model predicts zero.
                nn.init.zeros_(self.proj_out.weight)
                nn.init.zeros_(self.proj_out.bias)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Receive the hidden states of the previous pipeline stage (Megatron-Core's schedules call this)."""
        self.transformer.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text_hidden_states: Tensor,
        text_pooled: Tensor,
        sample_keys: Tensor,
    ) -> Tensor:
        """Predict the velocity.

        Args:
            latents: noisy latents [B, C, height, width].
            timestep: float32 [B] in [0, 1000].
            text_hidden_states: [B, L, text_hidden_size].
            text_pooled: [B, pooled_size].
            sample_keys: int64 [B], from :func:`rmoe_megatron.counter_rng.sample_keys`; only training uses them.

        Returns:
            Velocity float32 [B, C, height, width] on the last pipeline stage, hidden states [L + S, B, H] before it.
        """
        dtype = self.config.params_dtype
        conditioning = F.silu(self.time_text_embed(timestep, text_pooled.to(dtype))).unsqueeze(0)
        hidden_states = None
        if self.pre_process:
            vision = self.pos_embed(latents.to(dtype)).to(dtype)
            text = self.context_embedder(text_hidden_states.to(dtype))
            hidden_states = torch.cat((text, vision), dim=1).transpose(0, 1).contiguous()
        hidden_states = self.transformer(
            hidden_states, attention_mask=None, context=conditioning, context_mask=sample_keys
        )
        if not self.post_process:
            return hidden_states
        vision = hidden_states[text_hidden_states.shape[1] :]
        scale, shift = self.modulation_out(conditioning)
        return self._unpatchify(self.proj_out(modulate(vision, shift, scale)).float(), latents.shape)

    def _unpatchify(self, patches: Tensor, shape: torch.Size) -> Tensor:
        """Put patches [S, B, patch * patch * C] together to an image of ``shape`` [B, C, height, width]."""
        batch, channels, height, width = shape
        size = self.patch_size
        patches = patches.view(height // size, width // size, batch, size, size, channels)
        return patches.permute(2, 5, 0, 3, 1, 4).reshape(shape)
