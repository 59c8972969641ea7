"""DiT: the class-conditional diffusion transformer (Peebles and Xie, 2022), hosted in Megatron-Core."""

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings
from torch import Tensor, nn

from rmoe_megatron.model.diffusion_transformer import DiffusionTransformer
from rmoe_megatron.model.dit.block import dit_block
from rmoe_megatron.model.sequence import scatter


class DiT(DiffusionTransformer):
    """Predicts the noise (and with ``learned_sigma`` its variance) or the velocity from class label and timestep.

    diffusers' DiT keeps the embedding of timestep and label in every block, DiT itself has one for all blocks;
    ``model.shared_conditioning`` says which. The output layer takes that of the first block.
    """

    conditioning_module = "conditioning"
    block = staticmethod(dit_block)

    def build_conditioning(self) -> None:
        """Build the embedding of timestep and class label, for all blocks or one for each."""
        model = self.run_config.model
        embeddings = [
            CombinedTimestepLabelEmbeddings(model.num_classes, model.hidden_size)
            for _ in range(1 if model.shared_conditioning else model.num_layers)
        ]
        for embedding in embeddings:
            # Labels are dropped before they come here, by numbers that don't depend on the layout.
            embedding.class_embedder.dropout_prob = 0.0
            embedding.time_proj.downscale_freq_shift = model.downscale_freq_shift
            embedding.time_proj.scale = model.timestep_scale
        self.conditioning = nn.ModuleList(embeddings).to(self.config.params_dtype)

    def forward(self, latents: Tensor, timestep: Tensor, rng_keys: Tensor, class_labels: Tensor) -> Tensor:
        """Predict noise and variance, or the velocity.

        Args:
            latents: noisy latents [B, C, height, width].
            timestep: float32 [B] in [0, 1000].
            rng_keys: int64 [B], from :func:`rmoe_megatron.counter_rng.sample_keys`; only training uses them.
            class_labels: int64 [B]; ``num_classes`` stands for the dropped label.

        Returns:
            float32 [B, C or 2 C, height, width] on the last pipeline stage, hidden states of this rank's tokens
            [S / (CP TP), B, H] before it.
        """
        dtype = self.config.params_dtype
        embedded = [embed(timestep, class_labels, hidden_dtype=dtype) for embed in self.conditioning]
        conditioning = F.silu(torch.stack(embedded))
        hidden_states = None
        if self.pre_process:
            vision = self.pos_embed(latents.to(dtype)).to(dtype)
            hidden_states = scatter(vision.transpose(0, 1), self.config).contiguous()
        hidden_states = self.run_blocks(hidden_states, conditioning, rng_keys, None)[-1]
        if not self.post_process:
            return hidden_states
        shift, scale = self.modulation_out(conditioning[:1])
        return self.project_out(hidden_states, shift, scale, latents, timestep)
