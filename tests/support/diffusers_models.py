"""Tiny random models of every architecture, made and saved by diffusers itself."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, ModelMixin, SD3Transformer2DModel
from torch import Tensor

SD3: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 6,
}
DIT: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 3,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 7,
}
TEXT_LENGTH = 5
# name -> (class, arguments): small versions of the published models.
ARCHITECTURES: dict[str, tuple[type[ModelMixin], dict[str, Any]]] = {
    "sd3-medium": (SD3Transformer2DModel, SD3),
    "sd3.5-medium": (
        SD3Transformer2DModel,
        SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    ),
    "sd3.5-large": (SD3Transformer2DModel, SD3 | {"qk_norm": "rms_norm", "num_layers": 4}),
    "dit": (DiTTransformer2DModel, DIT),
    "dit-patch-4-fixed-sigma": (DiTTransformer2DModel, DIT | {"patch_size": 4, "out_channels": 4}),
    "dit-own-embeddings": (DiTTransformer2DModel, DIT),
}


def make_model(name: str, seed: int = 0) -> ModelMixin:
    """A model whose weights are all random; a DiT shares its embeddings between blocks unless its name says not."""
    cls, arguments = ARCHITECTURES[name]
    model = cls(**arguments)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        if name in ("dit", "dit-patch-4-fixed-sigma"):
            first = model.transformer_blocks[0].norm1.emb.state_dict()
            for block in model.transformer_blocks:
                block.norm1.emb.load_state_dict(first)
    return model.eval()


def save_model(name: str, folder: Path, **arguments: Any) -> ModelMixin:
    """Save a random model as a diffusers folder and return it."""
    model = make_model(name)
    model.save_pretrained(folder, **arguments)
    return model


def inputs(name: str) -> dict[str, Tensor]:
    """Keyword arguments of diffusers' forward()."""
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    if name.startswith("dit"):
        labels = torch.tensor([3, 7])  # a class and the dropped label
        return {"hidden_states": latents, "timestep": torch.tensor([15.0, 870.0]), "class_labels": labels}
    return {
        "hidden_states": latents,
        "timestep": torch.tensor([15.0, 870.0]),
        "encoder_hidden_states": torch.randn(2, TEXT_LENGTH, 12, generator=generator),
        "pooled_projections": torch.randn(2, 10, generator=generator),
    }


def run_ours(model: Any, arguments: dict[str, Tensor]) -> Tensor:
    """Call the Megatron-Core model with diffusers' arguments."""
    names = {"encoder_hidden_states": "text_hidden_states", "pooled_projections": "text_pooled"}
    conditions = {names.get(name, name): value for name, value in arguments.items()}
    latents, timestep = conditions.pop("hidden_states"), conditions.pop("timestep")
    return model(latents, timestep, torch.arange(len(latents)), **conditions)


def in_memory[Model: torch.nn.Module](model: Model) -> Model:
    """Move weights that lie in a mapped file to where PyTorch puts tensors.

    How kernels sum, and so the last bit, depends on where rows begin: in a file that is 8 bytes after any other, as long as its header is.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model
