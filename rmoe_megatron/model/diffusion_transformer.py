"""What MM-DiT and DiT share: Megatron-Core's TransformerBlock between patch embedding and output projection."""

from dataclasses import replace
from typing import Any

import torch
from diffusers.models.embeddings import PatchEmbed
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from rmoe_megatron.config.model import DepthLoss, ModelConfig
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.diffusion.rectified_flow import to_velocity
from rmoe_megatron.hf.rotary import Rotary, grid_rotary
from rmoe_megatron.model.attention import Positions
from rmoe_megatron.model.block import BlockSettings
from rmoe_megatron.model.block_specs import stage_spec
from rmoe_megatron.model.depth import BlockInputs, Recall, latent_states, loop_states
from rmoe_megatron.model.modulation import Modulation, modulate
from rmoe_megatron.model.precision.layers import Layers
from rmoe_megatron.model.sequence import gather, mark_partial, num_shards, padded_length, scatter_context
from rmoe_megatron.model.transformer_config import transformer_config


class DiffusionTransformer(MegatronModule):
    """A transformer over image patches. Embeddings are diffusers' own modules.

    Every pipeline stage computes the conditioning itself; the first embeds, the last projects out. Between the two a
    rank has its part of the tokens, see :mod:`rmoe_megatron.model.sequence`.

    Args:
        config: a validated run configuration.
        pre_process: this is the first pipeline stage.
        post_process: this is the last pipeline stage.
        initialise: draw initial weights; False where they are loaded next, which saves time.
        vp_stage: which of the stage's model chunks it is, with the interleaved pipeline schedule.
    """

    conditioning_module: str  # name of the module that every pipeline stage has a copy of

    @staticmethod
    def block(model: ModelConfig, layer: int, settings: BlockSettings, layers: Layers) -> ModuleSpec:
        """Return class, parts and settings of block ``layer`` built of ``layers``, without what is added to it."""
        raise NotImplementedError

    def __init__(
        self,
        config: RunConfig,
        pre_process: bool = True,
        post_process: bool = True,
        initialise: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        transformer = transformer_config(config, initialise)
        transformer.has_cond_embedder = True  # read by Megatron-Core's finalize_model_grads
        super().__init__(config=transformer)
        self.run_config = config
        self.pre_process, self.post_process = pre_process, post_process
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        groups = ProcessGroupCollection.use_mpu_process_groups()
        # Counts model chunks as the layers run through them.
        self.stage = groups.pp.rank() + groups.pp.size() * (vp_stage or 0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed * 100_003)
            self.build_conditioning()
            for parameter in getattr(self, self.conditioning_module).parameters():
                parameter.pipeline_parallel = True  # Megatron-Core adds its gradients up over the stages,
                parameter.shared_embedding = True  # in buckets of its own, sharded alike on every stage,
                parameter.shared = self.stage > 0  # and counts it once in the gradient norm
            if pre_process:
                self.build_embeddings()
            self.transformer = TransformerBlock(
                transformer,
                stage_spec(config, self.block, transformer, groups.pp.rank(), vp_stage),
                pre_process=pre_process,
                post_process=post_process,
                pg_collection=groups,
                vp_stage=vp_stage,
            )
            if post_process:
                self.build_output()
            has_recall = config.loop is not None and config.loop.recall
            # Of text and of vision.
            self.recall = nn.ModuleList(Recall(transformer) for _ in range(2)) if has_recall else None

    def build_conditioning(self) -> None:
        """Build what makes the conditioning vector."""
        raise NotImplementedError

    def build_embeddings(self) -> None:
        """Build the patch embedding with its sine-cosine positions."""
        model = self.run_config.model
        self.pos_embed = PatchEmbed(
            height=model.sample_size,
            width=model.sample_size,
            patch_size=model.patch_size,
            in_channels=model.in_channels,
            embed_dim=model.hidden_size,
            pos_embed_max_size=model.pos_embed_max_size or None,
        ).to(self.config.params_dtype)
        mark_partial(self.pos_embed, self.config)

    def build_output(self) -> None:
        """Build the modulated output projection; with adaLN-Zero the untrained model's output is zero."""
        model = self.run_config.model
        channels = model.in_channels * (2 if model.learned_sigma else 1)
        self.modulation_out = Modulation(self.config, num_vectors=2)
        self.proj_out = nn.Linear(
            model.hidden_size, model.patch_size**2 * channels, dtype=self.config.params_dtype
        )
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)
        mark_partial(self.proj_out, self.config)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Receive the hidden states of the previous pipeline stage (Megatron-Core's schedules call this)."""
        self.transformer.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Describe the stage's tensors to dist_checkpointing; the conditioning is the first stage's to write."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name, entry in state.items():
            if name.startswith(f"{prefix}{self.conditioning_module}."):
                state[name] = replace(entry, replica_id=(self.stage, *entry.replica_id[1:]))
        return state

    def run_blocks(
        self,
        hidden_states: Tensor | None,
        conditioning: Tensor,
        rng_keys: Tensor,
        positions: Positions | None,
    ) -> list[Tensor]:
        """Pass all blocks of this stage; returns hidden states to decode: the deepest last, in training maybe others before it.

        Args:
            hidden_states: this rank's tokens [(L_pad + S) / (CP TP), B, H] on the first pipeline stage, None on others.
            conditioning: [1, B, H] or [num_layers, B, H], after SiLU.
            rng_keys: int64 [B], one key of the counter-based random numbers for every sample.
        """
        config = self.run_config
        depth_loss = config.diffusion.depth_loss if self.training else DepthLoss.last
        if config.loop is None and depth_loss is DepthLoss.last:
            return [
                self.transformer(
                    hidden_states,
                    attention_mask=None,
                    context=conditioning,
                    context_mask=rng_keys,
                    rotary_pos_emb=positions,
                )
            ]
        assert hidden_states is not None  # layout_checks: there is one pipeline stage
        inputs, layers = BlockInputs(conditioning, rng_keys, positions), self.transformer.layers
        if config.loop is not None:
            shards = num_shards(self.config)
            text_tokens = padded_length(config.model.text_length, shards) // shards
            return loop_states(
                layers, config.loop, self.recall, text_tokens, hidden_states, inputs, depth_loss
            )
        assert config.recurrence is not None
        first, steps = min(config.recurrence.layers), config.recurrence.steps
        return latent_states(layers, first, steps, hidden_states, inputs)

    def positions(self, latents: Tensor) -> Positions | None:
        """Return the rotary positions of this rank's tokens for latents [B, C, height, width]; None for a model without them.

        Text tokens stand at the first row and column; with ``model.text_on_grid`` the first ones are the cells of the model's own square.
        """
        model = self.run_config.model
        if model.rope_theta is None:
            return None
        head_dim, theta = model.hidden_size // model.num_attention_heads, model.rope_theta

        def scattered(height: int, width: int, length: int | None = None) -> Rotary:
            whole = grid_rotary(height, width, head_dim, theta, latents.device, length)
            return Rotary(*(scatter_context(table, self.config) for table in whole))

        height, width = (side // model.patch_size for side in latents.shape[2:])
        side = model.sample_size // model.patch_size
        text = scattered(side, side, model.text_length) if model.text_on_grid else None
        return Positions(scattered(height, width), text)

    def project_out(
        self, vision: Tensor, shift: Tensor, scale: Tensor, latents: Tensor, timestep: Tensor
    ) -> Tensor:
        """Return the model's output float32 [B, C or 2 C, height, width] from this rank's last vision tokens.

        The ranks' patches are gathered: all have the whole output. A model that predicts the sample returns the velocity that follows from it.
        """
        patches = gather(self.proj_out(modulate(vision, shift, scale)), self.config).float()
        size, (batch, _, height, width) = self.run_config.model.patch_size, latents.shape
        patches = patches.view(height // size, width // size, batch, size, size, -1)
        output = patches.permute(2, 5, 0, 3, 1, 4).reshape(batch, -1, height, width)
        return to_velocity(self.run_config.diffusion.prediction, output, latents, timestep)
