"""Stable Diffusion 3's weights in the layout that it was published in, with random values."""

import torch
from torch import Tensor

CHANNELS, PATCH, TEXT, POOLED, SIDE = 4, 2, 12, 10, 6


def original_sd3(
    depth: int, hidden: int, head: int | None = None, second: tuple[int, ...] = ()
) -> dict[str, Tensor]:
    """Return the tensors of a transformer.

    Args:
        head: width of a head if queries and keys have norms.
        second: blocks with a second attention of the image.
    """
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def add(name: str, *shape: int) -> None:
        state[name] = torch.randn(shape, generator=generator) * 0.1

    def linear(name: str, outputs: int, inputs: int) -> None:
        add(f"{name}.weight", outputs, inputs)
        add(f"{name}.bias", outputs)

    add("pos_embed", 1, SIDE**2, hidden)
    add("x_embedder.proj.weight", hidden, CHANNELS, PATCH, PATCH)
    add("x_embedder.proj.bias", hidden)
    for embedder, width in (("t_embedder", 256), ("y_embedder", POOLED)):
        linear(f"{embedder}.mlp.0", hidden, width)
        linear(f"{embedder}.mlp.2", hidden, hidden)
    linear("context_embedder", hidden, TEXT)
    for block in range(depth):
        for stream in ("x_block", "context_block"):
            name, is_last = f"joint_blocks.{block}.{stream}", stream == "context_block" and block == depth - 1
            has_second = stream == "x_block" and block in second
            linear(f"{name}.adaLN_modulation.1", (2 if is_last else 9 if has_second else 6) * hidden, hidden)
            for attention in ("attn", "attn2") if has_second else ("attn",):
                linear(f"{name}.{attention}.qkv", 3 * hidden, hidden)
                if head is not None:
                    add(f"{name}.{attention}.ln_q.weight", head)
                    add(f"{name}.{attention}.ln_k.weight", head)
                if not is_last:
                    linear(f"{name}.{attention}.proj", hidden, hidden)
            if not is_last:
                linear(f"{name}.mlp.fc1", 4 * hidden, hidden)
                linear(f"{name}.mlp.fc2", hidden, 4 * hidden)
    linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    linear("final_layer.linear", PATCH**2 * CHANNELS, hidden)
    return state
