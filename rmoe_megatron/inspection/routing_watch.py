"""Listens to the gates and the attention of an exported model while it samples."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from torch import Tensor

from rmoe_megatron.hf import recurrence as recurrence_code
from rmoe_megatron.hf.recurrence import Recurrence

SAMPLED_TOKENS = 64  # of a picture, whose states and attention are kept


@dataclass
class Place:
    """One latent step of one block, or of one pass of it if it is in a loop, as it was in every call of the model.

    Attributes:
        picked: uint16 [B, S] of each call: the module of each token.
        entropy: float [B] of each call: the mean entropy of softmax(logits) over the tokens, from 0 to 1.
        text_share: float [B] of each call: the attention that sampled tokens give to the text.
        shift: float [B] of each call: by how much it differs from that of the latent step before, as half of the sum of absolute
            differences: 0 is the same, 1 has nothing in common. Not of a first latent step.
        states: float16 [B, s, H] of the first, the middle and the last sampling step: the states of sampled tokens before the latent step.
    """

    picked: list[np.ndarray] = field(default_factory=list)
    entropy: list[np.ndarray] = field(default_factory=list)
    text_share: list[np.ndarray] = field(default_factory=list)
    shift: list[np.ndarray] = field(default_factory=list)
    states: list[np.ndarray] = field(default_factory=list)


@dataclass
class Routing:
    """What was heard while pictures of one prompt were sampled.

    Attributes:
        timesteps: of each call of the model, from 1000 down.
        places: by block, pass and latent step; blocks count from 0, the others from 1.
        tokens: which tokens were sampled, as places in a picture.
    """

    timesteps: list[float] = field(default_factory=list)
    places: dict[tuple[int, int, int], Place] = field(default_factory=dict)
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


class RoutingWatch:
    """Keeps what the gates of a pipeline's model decide of the conditional half of every batch."""

    def __init__(self, pipeline: DiffusionPipeline, images: int, steps: int) -> None:
        self.images = images
        self.kept_calls = {0, steps // 2, steps - 1}
        # diffusers' own pipeline puts the pictures without a prompt first, this project's and DiT's put them last.
        self.is_conditional_last = isinstance(pipeline, StableDiffusion3Pipeline)
        self.routing = Routing()
        self._calls: dict[int, int] = {}  # of each block's gate since the model was called
        self._current: tuple[Place, int] | None = None
        self._attention: Tensor | None = None  # of the latent step before

    @torch.no_grad()
    def hear_model(self, timestep: Tensor) -> None:
        """Begin a call of the model."""
        self.routing.timesteps.append(float(timestep.flatten()[0]))
        self._calls = {}

    @torch.no_grad()
    def hear_gate(self, block: int, recurrence: Recurrence, state: Tensor, conditioning: Tensor) -> None:
        """Keep a decision; state [B, S, H] and conditioning [B, H] are what the gate is given."""
        number = self._calls.get(block, 0)
        self._calls[block] = number + 1
        passed, latent_step = divmod(number, recurrence.steps)
        place = self.routing.places.setdefault((block, passed + 1, latent_step + 1), Place())
        logits = recurrence.gate.logits(self._conditional(state), self._conditional(conditioning))
        place.picked.append(logits.argmax(dim=-1).to(torch.int32).cpu().numpy().astype(np.uint16))
        log_probability = logits.log_softmax(dim=-1)
        entropy = -(log_probability.exp() * log_probability).sum(dim=-1).mean(dim=-1)
        most = np.log(max(logits.shape[-1], 2))
        place.entropy.append((entropy / most).cpu().numpy())
        if not len(self.routing.tokens):
            self.routing.tokens = _spread(state.shape[1])
        if len(self.routing.timesteps) - 1 in self.kept_calls:
            sampled = self._conditional(state)[:, torch.as_tensor(self.routing.tokens, device=state.device)]
            place.states.append(sampled.half().cpu().numpy())
        self._current = place, latent_step

    @torch.no_grad()
    def hear_attention(self, query: Tensor, key: Tensor) -> None:
        """Keep where sampled tokens look in the latent step under way; query and key are [B, heads, tokens, head_dim], vision first."""
        if self._current is None:
            return
        place, latent_step = self._current
        self._current = None
        asking = self._conditional(query)[
            :, :, torch.as_tensor(self.routing.tokens, device=query.device)
        ].float()
        scores = asking @ self._conditional(key).float().transpose(-2, -1) * query.shape[-1] ** -0.5
        attention = scores.softmax(dim=-1).mean(dim=1)  # [B, s, tokens]
        vision = place.picked[-1].shape[1]
        place.text_share.append(attention[..., vision:].sum(dim=-1).mean(dim=-1).cpu().numpy())
        if latent_step > 0 and self._attention is not None:
            difference = (attention - self._attention).abs().sum(dim=-1) / 2
            place.shift.append(difference.mean(dim=-1).cpu().numpy())
        self._attention = attention

    def _conditional(self, values: Tensor) -> Tensor:
        if len(values) == self.images:
            return values
        return values[-self.images :] if self.is_conditional_last else values[: self.images]


def _spread(count: int) -> np.ndarray:
    """Return up to 64 tokens, spread over all."""
    return np.unique(np.linspace(0, count - 1, min(count, SAMPLED_TOKENS)).round().astype(np.int64))


@contextmanager
def watching(pipeline: DiffusionPipeline, images: int, steps: int) -> Iterator[Routing]:
    """Listen to a pipeline's model while it samples so many pictures in one batch; the model is as before afterwards."""
    watch = RoutingWatch(pipeline, images, steps)
    attend = recurrence_code.attend

    def attend_and_tell(attention: Any, query: Tensor, key: Tensor, value: Tensor, own: Tensor) -> Tensor:
        watch.hear_attention(query, key)
        return attend(attention, query, key, value, own)

    def called(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        watch.hear_model(torch.as_tensor(named["timestep"]))

    with ExitStack() as stack:
        stack.enter_context(patch.object(recurrence_code, "attend", attend_and_tell))
        hooks = [pipeline.transformer.register_forward_pre_hook(called, with_kwargs=True)]
        for name, module in pipeline.transformer.named_modules():
            if isinstance(module, Recurrence):
                block = int(next(part for part in name.split(".") if part.isdigit()))

                def decided(
                    gate: Any,
                    arguments: tuple[Tensor, Tensor],
                    block: int = block,
                    module: Recurrence = module,
                ) -> None:
                    watch.hear_gate(block, module, *arguments)

                hooks.append(module.gate.register_forward_pre_hook(decided))
        for hook in hooks:
            stack.callback(hook.remove)
        yield watch.routing
