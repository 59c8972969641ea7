"""Stable Diffusion 3 and 3.5 in one file of their original layout, seen under diffusers' names.

Such a file holds the transformer under ``model.diffusion_model.`` (or without this prefix), often beside the autoencoder and text
encoders. Which tensor of diffusers consists of which rows of which tensor of the file is asked of diffusers' own conversion: it is
run on the numbers of rows in the tensors' places, so that the weights themselves are read one at a time.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from torch import Tensor

from rmoe_megatron.config.model import ModelConfig
from rmoe_megatron.conversion.original_layout import Layout, Rows
from rmoe_megatron.errors import UserError
from rmoe_megatron.files.foreign_errors import refusal
from rmoe_megatron.files.untrusted import shown
from rmoe_megatron.pretrained.architecture import (
    TRANSFORMERS,
    ImportedArchitecture,
    describe_architecture,
)
from rmoe_megatron.pretrained.config_files import MAX_LAYERS, check_config
from rmoe_megatron.pretrained.safetensors_folder import FLOATING, SafetensorsFiles, list_problems

PREFIX = "model.diffusion_model."
SAMPLE_SIZE = 128  # latents of 1024 pixels, for which all of them were published
SHIFT = 3.0  # of sigma, as in all of their pipelines
HEAD_SIZE = 64  # where no norm of queries tells it
MAX_ROWS = 1 << 24
_BLOCK = re.compile(r"joint_blocks\.(0|[1-9]\d{0,2})\.", re.ASCII)
_SECOND = re.compile(r"joint_blocks\.(0|[1-9]\d{0,2})\.x_block\.attn2\.", re.ASCII)
_ROW_BITS = 32  # of a row's number; those above number the tensor
# Tensors that tell the architecture, with the number of their axes.
_TELLING = {
    "pos_embed": 3, "x_embedder.proj.weight": 4, "context_embedder.weight": 2, "y_embedder.mlp.0.weight": 2, "final_layer.linear.bias": 1,
}  # fmt: skip


class SD3File:
    """The transformer in a ``.safetensors`` file of Stable Diffusion 3 or 3.5.

    Attributes:
        passed_over: the beginnings of the names of what else is in the file.

    Raises:
        UserError: the file cannot be read, holds no such transformer, or has tensors that it does not have.
    """

    def __init__(self, path: Path, text_length: int) -> None:
        self.path = path
        self._files = SafetensorsFiles([path], only_floating=False, follow=True)
        names = list(self._files.shapes)
        inside = [name for name in names if name.startswith(PREFIX)]
        self._names = {name.removeprefix(PREFIX): name for name in inside or names}
        others = {name.partition(".")[0] for name in names if inside and not name.startswith(PREFIX)}
        self.passed_over = sorted(others)
        self._shapes = {name: self._files.shapes[full] for name, full in self._names.items()}
        self._check_names()
        self.architecture = self._describe(text_length)
        self._layout = self._layout_of_diffusers()
        self.shapes = {
            name: (sum(end - start for start, end in rows.runs or ()), *self._shapes[rows.source][1:])
            for name, rows in self._layout.items()
        }

    def read(self, name: str) -> Tensor:
        """Return the tensor under a name of diffusers."""
        rows = self._layout[name]
        return rows.take(self._files.read(self._names[rows.source]))

    def _check_names(self) -> None:
        """Check that the names are those of a transformer, before diffusers' conversion is asked."""
        if not any(map(_BLOCK.match, self._shapes)):
            other = next((name for name in self._shapes if name.startswith("transformer_blocks.")), None)
            what = (
                "is in diffusers' layout; name its folder, which has a config.json"
                if other
                else "does not hold Stable Diffusion 3 in its original layout (there are no joint_blocks)"
            )
            raise UserError(f"{self.path} {what}.")
        for name, shape in self._shapes.items():
            dtype = self._files.dtypes[self._names[name]]
            if dtype not in FLOATING:
                raise UserError(
                    f"{self.path} has {shown(name)} of type {dtype}; weights are {', '.join(FLOATING)}."
                )
            if not shape or not math.prod(shape) > 0 or shape[0] > MAX_ROWS:
                raise UserError(f"{self.path} has {shown(name)} of shape {shape}, as no weight is.")
        for name, axes in _TELLING.items():
            if len(self._shapes.get(name, ())) != axes:
                raise UserError(
                    f"{self.path} does not hold Stable Diffusion 3: {name} is missing or has not {axes} axes."
                )
        numbers = self._blocks()
        if numbers != list(range(len(numbers))) or len(numbers) > MAX_LAYERS:
            raise UserError(
                f"{self.path} lacks blocks between the first and the last, or has more than {MAX_LAYERS}."
            )

    def _blocks(self) -> list[int]:
        return sorted({int(found[1]) for name in self._shapes if (found := _BLOCK.match(name))})

    def _describe(self, text_length: int) -> ImportedArchitecture:
        """Return the architecture that the shapes tell; shift and size of images are those of the published models."""
        shapes = self._shapes
        hidden, channels, patch, _ = shapes["x_embedder.proj.weight"]
        norms = [shape for name, shape in shapes.items() if name.endswith("x_block.attn.ln_q.weight")]
        head = norms[0][0] if norms else HEAD_SIZE
        if hidden % head:
            raise UserError(
                f"{self.path} has hidden size {hidden}, which is no multiple of its heads' {head}."
            )
        side = math.isqrt(shapes["pos_embed"][1])
        values: dict[str, Any] = {
            "_class_name": "SD3Transformer2DModel",
            "sample_size": min(SAMPLE_SIZE, side * patch),
            "patch_size": patch,
            "in_channels": channels,
            "out_channels": shapes["final_layer.linear.bias"][0] // patch**2,
            "num_layers": len(self._blocks()),
            "attention_head_dim": head,
            "num_attention_heads": hidden // head,
            "joint_attention_dim": shapes["context_embedder.weight"][1],
            "caption_projection_dim": shapes["context_embedder.weight"][0],
            "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
            "pos_embed_max_size": side,
            "dual_attention_layers": sorted({int(found[1]) for name in shapes if (found := _SECOND.match(name))}),
            "qk_norm": "rms_norm" if norms else None,
        }  # fmt: skip
        described = describe_architecture(
            check_config(values, TRANSFORMERS, self.path), self.path, text_length
        )
        described.diffusion.shift = SHIFT
        return described

    def _layout_of_diffusers(self) -> Layout:
        """Return where diffusers' conversion finds its tensors among those of the file."""
        rows = {name: shape[0] for name, shape in self._shapes.items()}
        try:
            with refusal(f"{self.path} does not hold Stable Diffusion 3 in its original layout"):
                layout, left = layout_of_diffusers(rows)
        except UserError as error:
            if isinstance(error.__cause__, KeyError):
                raise UserError(
                    f"{self.path} does not hold Stable Diffusion 3: missing {shown(error.__cause__.args[0])[1:-1]}."
                ) from error
            raise
        if left:
            problems = [f"unexpected {shown(name)[1:-1]}" for name in left]
            raise UserError(f"{self.path} does not hold Stable Diffusion 3 alone: {list_problems(problems)}.")
        return layout


def layout_of_diffusers(rows: dict[str, int]) -> tuple[Layout, list[str]]:
    """Ask diffusers' conversion which rows of which tensors of the original layout its own consist of.

    Args:
        rows: how many each tensor of the original layout has.

    Returns:
        The layout, and the tensors that the conversion has no use for.
    """
    sources = list(rows)
    numbers = {
        name: torch.arange(count) + (number << _ROW_BITS) for number, (name, count) in enumerate(rows.items())
    }
    converted = convert_sd3_transformer_checkpoint_to_diffusers(numbers)  # takes out what it has used
    return {name: _rows(found, sources) for name, found in converted.items()}, sorted(numbers)


def _rows(numbers: Tensor, sources: list[str]) -> Rows:
    """Return the tensor and the runs of rows that numbers int64 [rows] stand for."""
    rows = numbers & ((1 << _ROW_BITS) - 1)
    breaks = (torch.diff(numbers) != 1).nonzero().flatten() + 1
    edges = [0, *breaks.tolist(), len(rows)]
    first = rows.tolist()
    runs = [
        (first[start], first[start] + end - start) for start, end in zip(edges[:-1], edges[1:], strict=True)
    ]
    return Rows(sources[int(numbers[0]) >> _ROW_BITS], tuple(runs))


def sd3_layout(model: ModelConfig) -> Layout:
    """Return where the tensors of an MM-DiT lie in the original layout, under the names without a prefix."""
    layout, left = layout_of_diffusers(_original_rows(model))
    assert not left, left
    return layout


def _original_rows(model: ModelConfig) -> dict[str, int]:
    """Return the tensors of the original layout, and how many rows each has."""
    hidden, head = model.hidden_size, model.hidden_size // model.num_attention_heads
    layers = {"x_embedder.proj": hidden, "context_embedder": hidden}
    layers |= {f"{name}.mlp.{number}": hidden for name in ("t_embedder", "y_embedder") for number in (0, 2)}
    layers |= {"final_layer.adaLN_modulation.1": 2 * hidden}
    layers |= {"final_layer.linear": model.patch_size**2 * model.in_channels}
    norms: dict[str, int] = {}
    for block in range(model.num_layers):
        for stream in ("x_block", "context_block"):
            name = f"joint_blocks.{block}.{stream}"
            is_last = stream == "context_block" and block == model.num_layers - 1  # nothing reads its text
            is_dual = stream == "x_block" and block in model.dual_attention_layers
            vectors = 2 if is_last else 9 if is_dual else 6
            layers[f"{name}.adaLN_modulation.1"] = vectors * hidden
            for attention in ("attn", "attn2") if is_dual else ("attn",):
                layers[f"{name}.{attention}.qkv"] = 3 * hidden
                if not is_last:
                    layers[f"{name}.{attention}.proj"] = hidden
                if model.qk_norm:
                    norms |= {f"{name}.{attention}.ln_{each}.weight": head for each in ("q", "k")}
            if not is_last:
                layers |= {f"{name}.mlp.fc1": 4 * hidden, f"{name}.mlp.fc2": hidden}
    parameters = {
        f"{name}.{parameter}": rows for name, rows in layers.items() for parameter in ("weight", "bias")
    }
    return {"pos_embed": 1} | parameters | norms
