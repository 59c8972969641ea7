"""MM-DiT: Stable Diffusion 3's and 3.5's transformer, hosted in Megatron-Core."""

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings
from torch import Tensor, nn

from rmoe_megatron.errors import UserError
from rmoe_megatron.model.diffusion_transformer import DiffusionTransformer
from rmoe_megatron.model.mmdit.block import joint_block
from rmoe_megatron.model.sequence import mark_partial, num_shards, padded_length, scatter


class MMDiT(DiffusionTransformer):
    """Predicts the velocity of noisy latents from text and timestep."""

    conditioning_module = "time_text_embed"
    block = staticmethod(joint_block)

    def build_conditioning(self) -> None:
        """Build the embedding of timestep and pooled text."""
        model = self.run_config.model
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(
            embedding_dim=model.hidden_size, pooled_projection_dim=model.pooled_size
        ).to(self.config.params_dtype)

    def build_embeddings(self) -> None:
        """Build the embeddings of patches and text tokens."""
        super().build_embeddings()
        model = self.run_config.model
        self.context_embedder = nn.Linear(
            model.text_hidden_size, model.hidden_size, dtype=self.config.params_dtype
        )
        mark_partial(self.context_embedder, self.config)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        rng_keys: Tensor,
        text_hidden_states: Tensor,
        text_pooled: Tensor,
    ) -> Tensor:
        """Predict the velocity.

        Args:
            latents: noisy latents [B, C, height, width].
            timestep: float32 [B] in [0, 1000].
            rng_keys: int64 [B], from :func:`rmoe_megatron.counter_rng.sample_keys`; only training uses them.
            text_hidden_states: [B, L, text_hidden_size] with L = ``model.text_length``.
            text_pooled: [B, pooled_size].

        Returns:
            Velocity float32 [B, C, height, width] on the last pipeline stage; in training that decodes D depths
            [D, B, C, height, width], the deepest last. Hidden states of this rank's tokens
            [(L_pad + S) / (CP TP), B, H] before it.

        Raises:
            UserError: the text has another length than the model.
        """
        length = self.run_config.model.text_length
        if text_hidden_states.shape[1] != length:
            raise UserError(
                f"The text has {text_hidden_states.shape[1]} tokens but model.text_length is {length}; encode it to that "
                "length."
            )
        dtype = self.config.params_dtype
        conditioning = F.silu(self.time_text_embed(timestep, text_pooled.to(dtype))).unsqueeze(0)
        hidden_states = None
        if self.pre_process:
            vision = self.pos_embed(latents.to(dtype)).to(dtype)
            text = self.context_embedder(text_hidden_states.to(dtype))
            streams = [scatter(tokens.transpose(0, 1), self.config) for tokens in (text, vision)]
            hidden_states = torch.cat(streams)
        states = self.run_blocks(hidden_states, conditioning, rng_keys, self.positions(latents))
        if not self.post_process:
            return states[-1]
        shards = num_shards(self.config)
        scale, shift = self.modulation_out(conditioning)
        outputs = [
            self.project_out(
                state[padded_length(length, shards) // shards :], shift, scale, latents, timestep
            )
            for state in states
        ]
        return outputs[0] if len(outputs) == 1 else torch.stack(outputs)
