"""The original DiT (Peebles and Xie, 2022) from its equations; parameters are named and shaped as in its checkpoints."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCIES = 128


def timestep_features(timestep: Tensor) -> Tensor:
    """cos(t f_i), then sin(t f_i), with f_i = 10000^(-i / 128) for i = 0 .. 127; [B, 256]."""
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(FREQUENCIES) / FREQUENCIES)
    angles = torch.outer(timestep.float(), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def positions(hidden_size: int, side: int) -> Tensor:
    """Fixed positions [1, side^2, H]: the column's sines and cosines in the first half, the row's in the second."""
    quarter = hidden_size // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.outer(torch.arange(side, dtype=torch.float64), frequencies)
    axis = torch.cat((angles.sin(), angles.cos()), dim=1)
    rows = [torch.cat((axis[column], axis[row])) for row in range(side) for column in range(side)]
    return torch.stack(rows).float().unsqueeze(0)


def normalised(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(tokens - mean) / sqrt(variance + 1e-6), scaled by 1 + scale and shifted."""
    centred = tokens - tokens.mean(-1, keepdim=True)
    unit = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)
    return unit * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, hidden = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, length, 3, self.heads, hidden // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        weights = torch.softmax(query @ key.transpose(-1, -2) / math.sqrt(hidden // self.heads), dim=-1)
        return self.proj((weights @ value).transpose(1, 2).reshape(batch, length, hidden))


class Mlp(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.fc2 = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        inner = self.fc1(tokens)
        gelu = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        return self.fc2(gelu)


def modulation(hidden_size: int, vectors: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, vectors * hidden_size))


class Block(nn.Module):
    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(hidden_size, heads)
        self.mlp = Mlp(hidden_size)
        self.adaLN_modulation = modulation(hidden_size, 6)

    def forward(self, tokens: Tensor, conditioning: Tensor) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(conditioning).chunk(6, 1)
        tokens = tokens + gate.unsqueeze(1) * self.attn(normalised(tokens, shift, scale))
        return tokens + mlp_gate.unsqueeze(1) * self.mlp(normalised(tokens, mlp_shift, mlp_scale))


class OriginalDiT(nn.Module):
    """Noise and variance of noisy latents."""

    def __init__(
        self, side: int, patch: int, channels: int, hidden_size: int, depth: int, heads: int, classes: int
    ) -> None:
        super().__init__()
        self.patch, self.channels = patch, 2 * channels
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(channels, hidden_size, patch, patch)
        self.t_embedder = nn.Module()
        self.t_embedder.mlp = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.y_embedder = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(classes + 1, hidden_size)
        self.pos_embed = nn.Parameter(positions(hidden_size, side // patch), requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, heads) for _ in range(depth))
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(hidden_size, patch**2 * self.channels)
        self.final_layer.adaLN_modulation = modulation(hidden_size, 2)

    def forward(self, latents: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        """Map latents [B, C, side, side] to [B, 2 C, side, side]."""
        tokens = self.x_embedder.proj(latents).flatten(2).transpose(1, 2) + self.pos_embed
        conditioning = self.t_embedder.mlp(timestep_features(timestep))
        conditioning = conditioning + self.y_embedder.embedding_table(labels)
        for block in self.blocks:
            tokens = block(tokens, conditioning)
        shift, scale = self.final_layer.adaLN_modulation(conditioning).chunk(2, 1)
        patches = self.final_layer.linear(normalised(tokens, shift, scale))
        columns = patches.unflatten(-1, (self.patch**2, self.channels)).permute(0, 3, 2, 1).flatten(1, 2)
        return F.fold(columns, latents.shape[-2:], self.patch, stride=self.patch)
