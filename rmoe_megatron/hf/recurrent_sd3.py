"""SD3's transformer with recursive sparse experts in chosen blocks, as a diffusers model.

This file and those it imports need diffusers alone: an exported folder can carry them (``--remote-code``).
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from diffusers import ModelMixin, SD3Transformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from rmoe_megatron.hf.carried_code import CarriesCode

from .recurrence import Recurrence, Turn, attend_jointly, project_vision, text_qkv, vision_qkv
from .rotary import grid_rotary, rotate

# DiffusionPipeline.from_pretrained loads a class of another library only if that module also names ModelMixin.
__all__ = ["ModelMixin", "RecurrentSD3Transformer2DModel"]


class RecurrentJointAttnProcessor:
    """Runs the recurrence of an attention layer in place of diffusers' JointAttnProcessor2_0."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        positions: tuple[Turn, Turn] = (None, None),
        unmodulated: Tensor | None = None,
        **_: Any,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Return what JointAttnProcessor2_0 returns; ``temb`` [B, H] is the conditioning vector."""
        return attn.recurrence(attn, hidden_states, encoder_hidden_states, temb, positions, unmodulated)


class OwnJointAttnProcessor:
    """Joint attention with rotary positions or without own values, in a block without recurrence."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        positions: tuple[Turn, Turn] = (None, None),
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what JointAttnProcessor2_0 returns; ``positions`` are those of vision and of text."""
        vision = vision_qkv(attn, project_vision(attn, hidden_states), positions[0])
        return attend_jointly(attn, vision, text_qkv(attn, encoder_hidden_states, positions[1]))


class DualAttnProcessor(JointAttnProcessor2_0):
    """diffusers' processor of the second attention; the block hands the conditioning vector to it as well."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        unmodulated: Tensor | None = None,
    ) -> Tensor:
        """Return what JointAttnProcessor2_0 returns."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)


class RecurrentJointTransformerBlock(JointTransformerBlock):
    """SD3's block whose joint attention also sees the conditioning vector, for the gate and the step modulation."""

    def __init__(self, *args: Any, recurrence: Recurrence, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attn.recurrence = recurrence
        self.attn.set_processor(RecurrentJointAttnProcessor())
        if self.attn2 is not None:
            self.attn2.set_processor(DualAttnProcessor())

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Apply the block; see diffusers' JointTransformerBlock."""
        return super().forward(
            hidden_states,
            encoder_hidden_states,
            temb,
            {**(joint_attention_kwargs or {}), "temb": temb, "unmodulated": hidden_states},
        )


class Recall(nn.Module):
    """``W [h; h_0]`` for each token: its state, and the one that it had when it came to the loop."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size, 2 * hidden_size))

    def forward(self, state: Tensor, start: Tensor) -> Tensor:
        """Return the next state [B, S, H]."""
        return nn.functional.linear(torch.cat((state, start), dim=-1), self.weight)


class LoopedBlocks(nn.ModuleList):
    """Transformer blocks that are gone through in the order in which the model passes them: some several times.

    Attributes:
        times: passes of the blocks ``first`` to ``last``; may be changed between calls of the model.
        recalls: what makes the states before each pass, of text and of vision.
    """

    recalls: tuple[Recall, ...] = ()

    def __init__(self, blocks: nn.ModuleList, first: int, last: int, times: int) -> None:
        super().__init__(list(blocks))
        self.first, self.last, self.times = first, last, times

    def __iter__(self) -> Iterator[Any]:
        """Iterate over what the model calls in turn, each with the arguments of a block."""
        blocks = list(super().__iter__())
        yield from blocks[: self.first]
        start: list[tuple[Tensor, Tensor]] = []

        def recall(
            hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            if not start:
                start.append((encoder_hidden_states, hidden_states))
            states = zip(self.recalls, (encoder_hidden_states, hidden_states), start[0], strict=True)
            text, vision = (each(state, first) for each, state, first in states)
            return text, vision

        for _ in range(self.times):
            if self.recalls:
                yield recall
            yield from blocks[self.first : self.last + 1]
        yield from blocks[self.last + 1 :]


class RecurrentSD3Transformer2DModel(CarriesCode, SD3Transformer2DModel):
    """diffusers' SD3Transformer2DModel with recurrence in the blocks ``recurrence["layers"]``.

    Args:
        recurrence: keys ``layers`` (block numbers from 0), ``num_modules``, ``steps``, ``rank`` (None: full rank),
            ``modulation`` and ``gate_inputs``; None is exactly SD3Transformer2DModel. The other arguments are those
            of SD3Transformer2DModel.
        loop: keys ``first`` and ``last`` (blocks that are passed ``times`` times) and ``recall``; None has none.
        rope_theta: base of the rotary positions in two dimensions; None has none.
        text_on_grid: text tokens have the rotary positions of the patches of an image of ``sample_size``.
        exclusive_attention: heads' outputs lose their part along the token's own value.
        min_sigma: None: the network's output is the velocity. Otherwise the network predicts the sample, from which
            the velocity follows as ``(noisy - sample) / max(sigma, min_sigma)``.
    """

    _no_split_modules = ["JointTransformerBlock", "RecurrentJointTransformerBlock"]
    _repeated_blocks = ["JointTransformerBlock", "RecurrentJointTransformerBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "gate"]
    _supports_gradient_checkpointing = True
    transformer_blocks: Any

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: tuple[int, ...] = (),
        qk_norm: str | None = None,
        recurrence: dict[str, Any] | None = None,
        min_sigma: float | None = None,
        loop: dict[str, Any] | None = None,
        rope_theta: float | None = None,
        text_on_grid: bool = False,
        exclusive_attention: bool = False,
    ) -> None:
        super().__init__(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            num_layers=num_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            caption_projection_dim=caption_projection_dim,
            pooled_projection_dim=pooled_projection_dim,
            out_channels=out_channels,
            pos_embed_max_size=pos_embed_max_size,
            dual_attention_layers=dual_attention_layers,
            qk_norm=qk_norm,
        )
        settings = dict(recurrence or {"layers": []})
        for layer in settings.pop("layers"):
            self.transformer_blocks[layer] = RecurrentJointTransformerBlock(
                dim=self.inner_dim,
                num_attention_heads=num_attention_heads,
                attention_head_dim=attention_head_dim,
                context_pre_only=layer == num_layers - 1,
                qk_norm=qk_norm,
                use_dual_attention=layer in dual_attention_layers,
                recurrence=Recurrence(self.inner_dim, **settings),
            )
        if loop is not None:
            looped = LoopedBlocks(self.transformer_blocks, loop["first"], loop["last"], loop["times"])
            self.transformer_blocks = looped
            if loop["recall"]:
                # Of text and of vision; what the blocks use belongs to the model, as its names say.
                looped.recalls = (Recall(self.inner_dim), Recall(self.inner_dim))
                self.recall = nn.ModuleList(looped.recalls)
        if rope_theta is not None or exclusive_attention:
            for each in self.transformer_blocks.children():
                each.attn.exclusive = exclusive_attention
                if not isinstance(each, RecurrentJointTransformerBlock):
                    each.attn.set_processor(OwnJointAttnProcessor())

    def forward(self, hidden_states: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """Predict the velocity; see diffusers' SD3Transformer2DModel."""
        if self.config.rope_theta is not None:
            text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[0]
            given = kwargs.get("joint_attention_kwargs") or {}
            kwargs["joint_attention_kwargs"] = {**given, "positions": self.positions(hidden_states, text)}
        output = super().forward(hidden_states, *args, return_dict=False, **kwargs)[0]
        if self.config.min_sigma is not None:
            timestep = kwargs["timestep"] if "timestep" in kwargs else args[2]
            sigma = (timestep / 1000).clamp_min(self.config.min_sigma).view(-1, 1, 1, 1)
            output = ((hidden_states.float() - output.float()) / sigma).to(output.dtype)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def set_depth(self, depth: int) -> None:
        """Pass the loop ``depth`` times from now on; without a loop, take so many latent steps in every recurrence.

        Raises:
            ValueError: the model has neither.
        """
        if isinstance(self.transformer_blocks, LoopedBlocks):
            self.transformer_blocks.times = depth
            return
        if not self.recurrent_blocks:
            raise ValueError("This model has neither a loop nor a recurrence, so it has no depth to set.")
        for block in self.recurrent_blocks:
            block.attn.recurrence.steps = depth

    def positions(self, latents: Tensor, text: Tensor) -> tuple[Turn, Turn]:
        """Return what turns queries and keys of vision and of text for latents [B, C, height, width], text [B, L, D]."""
        config = self.config
        height, width = (side // config.patch_size for side in latents.shape[2:])
        side = config.sample_size // config.patch_size
        of_grid = (config.attention_head_dim, config.rope_theta, latents.device)
        vision = partial(rotate, rotary=grid_rotary(height, width, *of_grid))
        if not config.text_on_grid:
            return vision, None
        text_grid = grid_rotary(side, side, *of_grid, length=text.shape[1])
        return vision, partial(rotate, rotary=text_grid)

    @property
    def recurrent_blocks(self) -> list[Any]:
        """Return the blocks that hold a recurrence."""
        blocks = self.transformer_blocks.children()
        return [block for block in blocks if isinstance(block, RecurrentJointTransformerBlock)]
