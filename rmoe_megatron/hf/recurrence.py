"""The recursion of attention in plain PyTorch, for inference in diffusers.

The equations are those of :mod:`rmoe_megatron.model.recurrence.recurrence` without Gumbel noise: every vision token goes to the
module with the largest logit, with weight 1.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

LAYER_NORM_EPS = 1.0e-6

# Turns queries or keys [B, heads, S, head_dim] by rotary positions; None leaves them.
Turn = Callable[[Tensor], Tensor] | None


class Gate(nn.Module):
    """Picks one module per token from the token state and the conditioning vector; logits in float32."""

    def __init__(self, hidden_size: int, num_modules: int, gate_inputs: list[str]) -> None:
        super().__init__()
        sees_tokens = "tokens" in gate_inputs or "unmodulated_tokens" in gate_inputs
        self.token = nn.Linear(hidden_size, num_modules, bias=False) if sees_tokens else None
        self.conditioning = (
            nn.Linear(hidden_size, num_modules, bias=False) if "conditioning" in gate_inputs else None
        )

    def forward(self, state: Tensor, conditioning: Tensor) -> Tensor:
        """Return the index of a module for every token [B, S], int64."""
        return self.logits(state, conditioning).argmax(dim=-1)

    def logits(self, state: Tensor, conditioning: Tensor) -> Tensor:
        """Return float32 logits [B, S, M] from token states [B, S, H] and the conditioning vector [B, H]."""
        logits: Tensor | float = 0.0
        if self.token is not None:
            logits = logits + F.linear(state.float(), self.token.weight.float())
        if self.conditioning is not None:
            from_conditioning = F.linear(conditioning.float(), self.conditioning.weight.float()).unsqueeze(1)
            logits = logits + from_conditioning.expand(-1, state.shape[1], -1)
        assert isinstance(logits, Tensor)
        return logits


class ModuleWeight(nn.Module):
    """A weight with a leading dimension over modules."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


class Experts(nn.Module):
    """The M modules: low-rank (``down`` [M, 3 r, H], ``up`` [M, 3, H, r]) or full-rank (``weight`` [M, 3 H, H])."""

    def __init__(self, hidden_size: int, num_modules: int, rank: int | None) -> None:
        super().__init__()
        self.rank = rank
        if rank is None:
            self.weight = nn.Parameter(torch.zeros(num_modules, 3 * hidden_size, hidden_size))
        else:
            self.down = ModuleWeight(num_modules, 3 * rank, hidden_size)
            self.up = ModuleWeight(num_modules, 3, hidden_size, rank)

    def forward(self, tokens: Tensor, modules: Tensor) -> Tensor:
        """Project tokens [N, H] with their ``modules`` [N]; returns [N, 3 H], q, k and v side by side."""
        order = modules.argsort(stable=True)
        counts = modules.bincount(minlength=self.num_modules).tolist()
        parts = [
            self._project(part, index)
            for index, part in enumerate(tokens[order].split(counts))
            if part.shape[0]
        ]
        return torch.empty_like(torch.cat(parts)).index_copy(0, order, torch.cat(parts))

    @property
    def num_modules(self) -> int:
        """Return M."""
        return (self.weight if self.rank is None else self.up.weight).shape[0]

    def _project(self, tokens: Tensor, module: int) -> Tensor:
        if self.rank is None:
            return F.linear(tokens, self.weight[module])
        reduced = F.linear(tokens, self.down.weight[module]).unflatten(-1, (3, self.rank))
        return torch.einsum("nkr,khr->nkh", reduced, self.up.weight[module]).flatten(1)


class Recurrence(nn.Module):
    """Gate, step modulation and experts of one block's attention."""

    def __init__(
        self,
        hidden_size: int,
        num_modules: int,
        steps: int,
        rank: int | None,
        modulation: bool,
        gate_inputs: list[str],
    ) -> None:
        super().__init__()
        self.steps = steps
        self.sees_unmodulated = "unmodulated_tokens" in gate_inputs
        self.gate = Gate(hidden_size, num_modules, gate_inputs)
        self.modulation = nn.Linear(hidden_size, 2 * hidden_size) if modulation else None
        self.experts = Experts(hidden_size, num_modules, rank)

    def forward(
        self,
        attention: Attention,
        vision: Tensor,
        text: Tensor | None,
        temb: Tensor,
        positions: tuple[Turn, Turn] = (None, None),
        unmodulated: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention output of vision [B, S, H] and text [B, L, H] (None in SD3's last block and in DiT).

        Args:
            attention: diffusers' attention of the block.
            vision: modulated vision tokens [B, S, H].
            text: modulated text tokens [B, L, H]; None in DiT.
            temb: conditioning vector [B, H], before SiLU.
            positions: rotary ones of vision and of text, as what turns queries and keys by them.
            unmodulated: vision tokens before normalisation and modulation, for a gate that sees them.
        """
        conditioning = F.silu(temb)
        of_text = None if text is None else text_qkv(attention, text, positions[1])
        to_gate: Tensor | float = 0.0
        if self.sees_unmodulated:
            assert unmodulated is not None
            to_gate = F.layer_norm(unmodulated, unmodulated.shape[-1:], eps=LAYER_NORM_EPS) - vision
        state = vision
        for _ in range(self.steps - 1):
            projected = self.apply_modules(state, conditioning, to_gate)
            query, key, value = vision_qkv(attention, projected, positions[0])
            own = value
            if of_text is not None:
                key, value = torch.cat((key, of_text[1]), 2), torch.cat((value, of_text[2]), 2)
            state = attention.to_out[0](attend(attention, query, key, value, own)) + vision
        projected = self.apply_modules(state, conditioning, to_gate) + project_vision(attention, vision)
        return attend_jointly(attention, vision_qkv(attention, projected, positions[0]), of_text)

    def apply_modules(self, state: Tensor, conditioning: Tensor, to_gate: Tensor | float) -> Tensor:
        """Project token states [B, S, H] with the module picked for each; returns [B, S, 3 H]."""
        modules = self.gate(state + to_gate, conditioning)
        tokens = F.layer_norm(state, state.shape[-1:], eps=LAYER_NORM_EPS)
        if self.modulation is not None:
            scale, shift = self.modulation(conditioning).unsqueeze(1).chunk(2, dim=-1)
            tokens = tokens * (1 + scale) + shift
        return self.experts(tokens.flatten(0, 1), modules.flatten()).unflatten(0, state.shape[:2])


def text_qkv(attention: Attention, text: Tensor, turn: Turn) -> tuple[Tensor, ...]:
    """Project text tokens [B, L, H] to normalised heads; they are the same in every latent step."""
    projected = attention.add_q_proj(text), attention.add_k_proj(text), attention.add_v_proj(text)
    return normalise(heads(attention, *projected), attention.norm_added_q, attention.norm_added_k, turn)


def project_vision(attention: Attention, vision: Tensor) -> Tensor:
    """Project vision tokens [B, S, H] with the block's own weights, to [B, S, 3 H]."""
    return torch.cat((attention.to_q(vision), attention.to_k(vision), attention.to_v(vision)), dim=-1)


def vision_qkv(attention: Attention, projected: Tensor, turn: Turn) -> tuple[Tensor, ...]:
    """Split [B, S, 3 H] into normalised heads."""
    return normalise(heads(attention, *projected.chunk(3, dim=-1)), attention.norm_q, attention.norm_k, turn)


def attend_jointly(
    attention: Attention, vision: tuple[Tensor, ...], text: tuple[Tensor, ...] | None
) -> tuple[Tensor, Tensor | None]:
    """Return the outputs of vision [B, S, H] and text [B, L, H] (None in SD3's last block and in DiT) from their heads."""
    length, joint = vision[0].shape[2], vision
    if text is not None:
        joint = tuple(torch.cat(parts, dim=2) for parts in zip(vision, text, strict=True))
    attended = attend(attention, joint[0], joint[1], joint[2], own=joint[2])
    output = attention.to_out[0](attended[:, :length])
    if text is None or attention.context_pre_only:
        return output, None
    return output, attention.to_add_out(attended[:, length:])


def heads(attention: Attention, *streams: Tensor) -> tuple[Tensor, ...]:
    """Split [B, S, H] tensors into [B, heads, S, head_dim]."""
    return tuple(stream.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for stream in streams)


def normalise(
    qkv: tuple[Tensor, ...],
    norm_query: nn.Module | None,
    norm_key: nn.Module | None,
    turn: Turn,
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply the QK norm where the block has one, and rotary positions where there are any."""
    query, key, value = qkv
    query = norm_query(query) if norm_query is not None else query
    key = norm_key(key) if norm_key is not None else key
    if turn is not None:
        query, key = turn(query), turn(key)
    return query, key, value


def attend(attention: Attention, query: Tensor, key: Tensor, value: Tensor, own: Tensor) -> Tensor:
    """Softmax attention of [B, heads, S, head_dim] tensors; returns [B, S, H].

    Args:
        attention: if it is exclusive, heads' outputs lose their part along the token's own value.
        own: values of the tokens that ask.
    """
    attended = F.scaled_dot_product_attention(query, key, value)
    if getattr(attention, "exclusive", False):
        heads, values = attended.float(), own.float()
        share = (heads * values).sum(-1, keepdim=True) / values.square().sum(-1, keepdim=True).clamp_min(
            1e-12
        )
        attended = (heads - share * values).to(attended.dtype)
    return attended.transpose(1, 2).flatten(2)
