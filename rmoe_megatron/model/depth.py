"""Models that think for longer: blocks that are passed several times, and what is decoded after each depth in training.

With ``loop`` the blocks ``first`` to ``last`` are passed ``times`` times; before each pass the state recalls what entered the loop.
The depth of a model is the number of its loops, or without a loop the number T of latent steps of its recurrence. Training can
decode every depth (deep supervision), or the deepest and a shallower one that is drawn for each sample; see
:mod:`rmoe_megatron.diffusion.depth_loss`. Layers and their order are those of one process: no pipeline.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from rmoe_megatron.config.model import DepthLoss, LoopConfig
from rmoe_megatron.counter_rng import Purpose, derive, uniform
from rmoe_megatron.model.sequence import mark_partial


class Recall(nn.Module):
    """``W [h; h_0]`` for each token of one stream: its state h, and h_0 which it had when it came to the loop.

    The weight [H, 2 H] starts as half the identity twice, so that the first pass begins with h_0 itself.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        half = torch.eye(config.hidden_size) / 2
        self.weight = nn.Parameter(torch.cat((half, half), dim=1).to(config.params_dtype))
        mark_partial(self, config)

    def forward(self, state: Tensor, start: Tensor) -> Tensor:
        """Return the next state [S, B, H] of states of that shape."""
        return nn.functional.linear(torch.cat((state, start), dim=-1), self.weight)


def draw_depths(rng_keys: Tensor, depth: int) -> Tensor:
    """Return for each sample a depth of 1 to ``depth`` - 1, int64 [B], from its key of the counter-based random numbers."""
    share = uniform(derive(rng_keys, Purpose.depth), 1).squeeze(-1)
    return 1 + (share * (depth - 1)).long()


@dataclass(frozen=True)
class BlockInputs:
    """What every block is handed beside the hidden states: conditioning [1, B, H], rng_keys int64 [B], rotary positions."""

    conditioning: Tensor
    rng_keys: Tensor
    positions: Any

    def apply(self, layers: nn.ModuleList, state: Tensor, loop: int = 0, steps: int | None = None) -> Tensor:
        """Pass layers in turn.

        Args:
            loop: number of the pass; the gates of each draw noise of their own.
            steps: latent steps of the recurrence; None is the model's number.
        """
        rng_keys = derive(self.rng_keys, Purpose.loop, loop) if loop else self.rng_keys
        for layer in layers:
            state = layer(
                hidden_states=state,
                context=self.conditioning,
                context_mask=rng_keys,
                rotary_pos_emb=self.positions,
                latent_steps=steps,
            )[0]
        return state


def loop_states(
    layers: nn.ModuleList,
    loop: LoopConfig,
    recalls: nn.ModuleList | None,
    text_tokens: int,
    state: Tensor,
    inputs: BlockInputs,
    depth_loss: DepthLoss,
) -> list[Tensor]:
    """Return the states that are decoded, shallowest first, each after the blocks behind the loop.

    Args:
        recalls: of text and of vision; None leaves the state as it is.
        text_tokens: this rank's tokens of text, which come first in the state [L + S, B, H].
        depth_loss: ``last`` decodes the last pass alone.
    """
    looped, after = layers[loop.first : loop.last + 1], layers[loop.last + 1 :]
    start = state = inputs.apply(layers[: loop.first], state)
    drawn = draw_depths(inputs.rng_keys, loop.times).view(1, -1, 1) if depth_loss is DepthLoss.drawn else None
    wanted: list[Tensor] = []
    shallow = state
    for number in range(loop.times):
        if recalls is not None:
            parts = zip(
                recalls, state.tensor_split([text_tokens]), start.tensor_split([text_tokens]), strict=True
            )
            state = torch.cat([recall(part, first) for recall, part, first in parts])
        state = inputs.apply(looped, state, loop=number)
        if drawn is not None:
            shallow = torch.where(drawn == number + 1, state, shallow)
        elif depth_loss is DepthLoss.every and number + 1 < loop.times:
            wanted.append(state)
    if drawn is not None:
        wanted.append(shallow)
    return [inputs.apply(after, each) for each in (*wanted, state)]


def latent_states(
    layers: nn.ModuleList, first: int, steps: int, state: Tensor, inputs: BlockInputs
) -> list[Tensor]:
    """Return the states after all blocks with 1 to ``steps`` latent steps in every recurrence; ``first`` is the first block with one."""
    state = inputs.apply(layers[:first], state)
    return [inputs.apply(layers[first:], state, steps=number) for number in range(1, steps + 1)]
