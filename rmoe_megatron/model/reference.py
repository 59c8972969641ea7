"""The recurrent joint attention in float64, written from the equations: dense masks, no Megatron-Core, no diffusers."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class ReferenceSettings:
    """Sizes and switches of one block."""

    num_heads: int
    num_modules: int
    steps: int
    rank: int | None = 4
    tau: float = 5.0
    qk_norm: bool = True
    modulation: bool = True
    gate_inputs: tuple[str, ...] = ("tokens", "conditioning")
    context_pre_only: bool = False
    exclusive: bool = False


def recurrent_joint_attention(
    settings: ReferenceSettings,
    weights: dict[str, Tensor],
    vision: Tensor,
    text: Tensor,
    conditioning: Tensor,
    gumbel: list[Tensor] | None,
    unmodulated: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention output of one block for vision [B, S, H] and text [B, L, H].

    ``unmodulated`` [B, S, H] are the vision tokens before normalisation and modulation. ``conditioning`` [B, H] is after SiLU; ``gumbel`` holds T tensors [B, S, M], None is evaluation. Weights have
    diffusers' names relative to ``attn.``.
    """

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (settings.num_heads, -1)).transpose(1, 2)

    def rms(name: str, x: Tensor) -> Tensor:
        if not settings.qk_norm:
            return x
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"]

    def normalised(x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        return (x - mean) / ((x - mean).pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    def attend(q: Tensor, k: Tensor, v: Tensor, own: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        heads = scores @ v
        if settings.exclusive:
            unit = own / own.norm(dim=-1, keepdim=True)
            heads = heads - (heads * unit).sum(-1, keepdim=True) * unit
        return heads.transpose(1, 2).flatten(2)

    def modules(state: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.zeros(*state.shape[:2], settings.num_modules, dtype=state.dtype)
        if "unmodulated_tokens" in settings.gate_inputs:
            assert unmodulated is not None
            seen = normalised(unmodulated) + (state - vision)
            logits = logits + seen @ weights["recurrence.gate.token.weight"].T
        if "tokens" in settings.gate_inputs:
            logits = logits + state @ weights["recurrence.gate.token.weight"].T
        if "conditioning" in settings.gate_inputs:
            logits = logits + (conditioning @ weights["recurrence.gate.conditioning.weight"].T)[:, None]
        z = logits if gumbel is None else logits + gumbel[step]
        picked = (z == z.amax(-1, keepdim=True)).to(z.dtype)
        p = (z / settings.tau).softmax(-1)
        gate = picked * (1 + p - p.detach()) if gumbel is not None else picked
        h = normalised(state)
        if settings.modulation:
            scale, shift = linear("recurrence.modulation", conditioning)[:, None].chunk(2, dim=-1)
            h = h * (1 + scale) + shift
        if settings.rank is None:
            every = torch.einsum("bsh,mkh->bsmk", h, weights["recurrence.experts.weight"])
        else:
            down = torch.einsum("bsh,mrh->bsmr", h, weights["recurrence.experts.down.weight"])
            down = down.unflatten(-1, (3, settings.rank))
            every = torch.einsum("bsmkr,mkhr->bsmkh", down, weights["recurrence.experts.up.weight"]).flatten(
                -2
            )
        q, k, v = (every * gate.unsqueeze(-1)).sum(2).chunk(3, dim=-1)
        return q, k, v

    c_q = rms("norm_added_q", split(linear("add_q_proj", text)))
    c_k = rms("norm_added_k", split(linear("add_k_proj", text)))
    c_v = split(linear("add_v_proj", text))
    state = vision
    for step in range(settings.steps - 1):
        q, k, v = modules(state, step)
        q, k, v = rms("norm_q", split(q)), rms("norm_k", split(k)), split(v)
        attended = attend(q, torch.cat((k, c_k), 2), torch.cat((v, c_v), 2), own=v)
        state = linear("to_out.0", attended) + vision
    q, k, v = modules(state, settings.steps - 1)
    q = rms("norm_q", split(q + linear("to_q", vision)))
    k = rms("norm_k", split(k + linear("to_k", vision)))
    v = split(v + linear("to_v", vision))
    values = torch.cat((v, c_v), 2)
    attended = attend(torch.cat((q, c_q), 2), torch.cat((k, c_k), 2), values, own=values)
    vision_out, text_out = attended.split([vision.shape[1], text.shape[1]], dim=1)
    return linear("to_out.0", vision_out), None if settings.context_pre_only else linear(
        "to_add_out", text_out
    )
