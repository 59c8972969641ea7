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

from rmoe_megatron.errors import UserError
from rmoe_megatron.pretrained.architecture import (
    TRANSFORMERS,
    ImportedArchitecture,
    describe_architecture,
)
from rmoe_megatron.pretrained.config_files import MAX_LAYERS, check_config
from rmoe_megatron.pretrained.safetensors_folder import FLOATING, SafetensorsFiles, list_problems
from rmoe_megatron.refusal import refusal
from rmoe_megatron.typed_files import shown

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
        self._rows = self._rows_of_diffusers()
        self.shapes = {
            name: (sum(end - start for start, end in parts), *self._shapes[source][1:])
            for name, (source, parts) in self._rows.items()
        }

    def read(self, name: str) -> Tensor:
        """Return the tensor under a name of diffusers."""
        source, parts = self._rows[name]
        tensor = self._files.read(self._names[source])
        return torch.cat([tensor[start:end] for start, end in parts])

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

    def _rows_of_diffusers(self) -> dict[str, tuple[str, list[tuple[int, int]]]]:
        """Return for every tensor of diffusers the tensor of the file, and first and last row (exclusive) of its parts."""
        sources = list(self._shapes)
        rows = {
            name: torch.arange(self._shapes[name][0]) + (number << _ROW_BITS)
            for number, name in enumerate(sources)
        }
        try:
            with refusal(f"{self.path} does not hold Stable Diffusion 3 in its original layout"):
                converted = convert_sd3_transformer_checkpoint_to_diffusers(rows)
        except UserError as error:
            if isinstance(error.__cause__, KeyError):
                raise UserError(
                    f"{self.path} does not hold Stable Diffusion 3: missing {shown(error.__cause__.args[0])[1:-1]}."
                ) from error
            raise
        if rows:  # the conversion takes out what it has used
            problems = [f"unexpected {shown(name)[1:-1]}" for name in sorted(rows)]
            raise UserError(f"{self.path} does not hold Stable Diffusion 3 alone: {list_problems(problems)}.")
        return {name: _parts(numbers, sources) for name, numbers in converted.items()}


def _parts(numbers: Tensor, sources: list[str]) -> tuple[str, list[tuple[int, int]]]:
    """Return the tensor and the runs of rows that numbers int64 [rows] stand for."""
    rows = numbers & ((1 << _ROW_BITS) - 1)
    breaks = (torch.diff(numbers) != 1).nonzero().flatten() + 1
    edges = [0, *breaks.tolist(), len(rows)]
    first = rows.tolist()
    parts = [
        (first[start], first[start] + end - start) for start, end in zip(edges[:-1], edges[1:], strict=True)
    ]
    return sources[int(numbers[0]) >> _ROW_BITS], parts
