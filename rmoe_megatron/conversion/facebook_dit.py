"""The checkpoint layout of the original DiT (facebookresearch/DiT) and of SiT, seen under diffusers' names."""

import argparse
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from rmoe_megatron.config.model import Architecture, DiffusionConfig, ModelConfig, Objective
from rmoe_megatron.conversion.original_layout import Layout, Rows
from rmoe_megatron.errors import UserError
from rmoe_megatron.files.foreign_errors import refusal
from rmoe_megatron.files.regular import check_regular
from rmoe_megatron.files.untrusted import shown
from rmoe_megatron.pretrained.architecture import ImportedArchitecture
from rmoe_megatron.pretrained.config_files import MAX_LAYERS
from rmoe_megatron.pretrained.safetensors_folder import list_problems

_TIMESTEP_MODULES = {"0": "linear_1", "2": "linear_2"}
_BLOCK_MODULES = {
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
    "norm1.linear": "adaLN_modulation.1",
}
_MODEL_MODULES = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
_EMBEDDINGS = {
    f"norm1.emb.timestep_embedder.{theirs}.{parameter}": f"t_embedder.mlp.{number}.{parameter}"
    for number, theirs in _TIMESTEP_MODULES.items()
    for parameter in ("weight", "bias")
} | {"norm1.emb.class_embedder.embedding_table.weight": "y_embedder.embedding_table.weight"}
_QKV = ("to_q", "to_k", "to_v")  # of attn1
# What tells the architecture: tensors with the number of their axes.
_TELLING = {"x_embedder.proj.weight": 4, "y_embedder.embedding_table.weight": 2, "final_layer.linear.bias": 1}
_NUMBERED = re.compile(r"blocks\.(0|[1-9]\d{0,3})\..+", re.ASCII)
WRAPPERS = (re.compile(r"module\."), re.compile(r"_orig_mod\."))
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Attention heads are not in the file; published DiTs have these.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}


class Checkpoint(NamedTuple):
    """A checkpoint of the original DiT's training.

    Attributes:
        tensors: the weights by name, the averaged ones where there are both.
        arguments: the arguments of the command that trained it, as far as the file holds them.
    """

    tensors: dict[str, Tensor]
    arguments: dict[str, object]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a ``.pt`` or ``.safetensors`` file; nothing in it is executed, and tensors stay in the file.

    Raises:
        UserError: the file cannot be read, or holds something else than named tensors of floating point.
    """
    check_regular(path, follow=True)
    with refusal(f"{path} cannot be read as a file of plain tensors"):
        if path.suffix == ".safetensors":
            content: object = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    tensors, arguments = content, {}
    if isinstance(content, dict):
        given = content.get("args")
        arguments = vars(given) if isinstance(given, argparse.Namespace) else {}
        for name in ("state_dict", "model", "ema"):
            tensors = content.get(name, tensors)
    if not isinstance(tensors, dict):
        raise UserError(
            f"{path} is not a DiT checkpoint: it holds a {type(tensors).__name__} and no tensors."
        )
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{path} is not a DiT checkpoint: its entry {shown(name)} is no named tensor.")
        if not _is_plain(value):
            raise UserError(
                f"{path} is not a DiT checkpoint: {shown(name)} is no plain tensor of floating point."
            )
    return Checkpoint({name: value.detach() for name, value in _without_prefixes(tensors).items()}, arguments)


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the names that they have without what DDP and torch.compile put before all of them."""
    while tensors and (found := next((each for each in WRAPPERS if all(map(each.match, tensors))), None)):
        tensors = {found.sub("", name, count=1): value for name, value in tensors.items()}
    return tensors


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has values of floating point, each with a place of its own in memory."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        return False
    if tensor.device.type != "cpu" or tensor.dtype not in FLOATING or tensor.numel() == 0:
        return False
    # A small file can describe a huge tensor whose values lie on top of each other.
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


class FacebookDiT:
    """A file of the original DiT, or of SiT, which has the same tensors; they are memory-mapped and named as in diffusers.

    The original computes another function of these weights than diffusers' DiT: the frequencies of its timestep
    features end just before 1/10000 of the first instead of there, and its norms have an epsilon of 1e-6. Both are part
    of :attr:`architecture`.

    Raises:
        UserError: the file cannot be read, is no plain tensor file, or is no DiT.
    """

    def __init__(self, path: Path, num_attention_heads: int | None = None) -> None:
        self.path = path
        self.tensors, self.arguments = read_checkpoint(path)
        for name, rank in _TELLING.items():
            if name not in self.tensors:
                raise UserError(f"{path} is not a DiT checkpoint: missing {name}.")
            if self.tensors[name].dim() != rank:
                shape = tuple(self.tensors[name].shape)
                raise UserError(f"{path} is not a DiT checkpoint: {name} has shape {shape}, not {rank} axes.")
        self.model = self._architecture(num_attention_heads)
        self.tensors.pop("pos_embed", None)  # a function of the size
        self._layout = dit_layout(self.model)
        expected = {rows.source for rows in self._layout.values()}
        problems = [f"missing {key}" for key in sorted(expected - self.tensors.keys())]
        problems += [f"unexpected {shown(key)[1:-1]}" for key in sorted(self.tensors.keys() - expected)]
        whole = {rows.source for rows in self._layout.values() if rows.runs is not None} & self.tensors.keys()
        problems += [
            f"{key} has shape {shape} instead of {3 * self.model.hidden_size} rows"
            for key in sorted(whole)
            if (shape := tuple(self.tensors[key].shape))[:1] != (3 * self.model.hidden_size,)
        ]
        if problems:
            raise UserError(f"{path} does not hold a DiT and nothing else: {list_problems(problems)}.")
        self.shapes = {name: self._shape(rows) for name, rows in self._layout.items()}

    @property
    def architecture(self) -> ImportedArchitecture:
        """Return the architecture that the shapes tell, trained with DDPM."""
        return ImportedArchitecture(self.model, None, DiffusionConfig(objective=Objective.ddpm))

    def read(self, name: str) -> Tensor:
        """Return the tensor under a name of diffusers."""
        rows = self._layout[name]
        return rows.take(self.tensors[rows.source])

    def _shape(self, rows: Rows) -> tuple[int, ...]:
        shape = tuple(self.tensors[rows.source].shape)
        return shape if rows.runs is None else (self.model.hidden_size, *shape[1:])

    def _architecture(self, num_attention_heads: int | None) -> ModelConfig:
        hidden_size, in_channels, patch_size, _ = self.tensors["x_embedder.proj.weight"].shape
        numbers = [int(match.group(1)) for name in self.tensors if (match := _NUMBERED.fullmatch(name))]
        heads = num_attention_heads or HEADS.get(hidden_size)
        outputs = self.tensors["final_layer.linear.bias"].shape[0] // patch_size**2
        positions = self.tensors.get("pos_embed")
        # Without positions: latents of images of 256 pixels.
        sample_size = 32
        if positions is not None:
            if positions.dim() != 3:
                raise UserError(f"{self.path} is not a DiT checkpoint: pos_embed has not 3 axes.")
            sample_size = math.isqrt(positions.shape[1]) * patch_size
        if heads is None:
            raise UserError(
                f"{self.path} has hidden size {hidden_size}, which is no published DiT; give --num-attention-heads."
            )
        if max(numbers, default=MAX_LAYERS) >= MAX_LAYERS:
            raise UserError(
                f"{self.path} is not a DiT checkpoint: it has no blocks, or more than {MAX_LAYERS}."
            )
        return ModelConfig(
            architecture=Architecture.dit,
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            num_layers=max(numbers) + 1,
            hidden_size=hidden_size,
            num_attention_heads=heads,
            qk_norm=False,
            mlp_norm_eps=1.0e-6,
            num_classes=self.tensors["y_embedder.embedding_table.weight"].shape[0] - 1,
            learned_sigma=outputs == 2 * in_channels,
            downscale_freq_shift=0.0,
        )


def dit_layout(model: ModelConfig) -> Layout:
    """Return where the tensors of a DiT lie in the original layout, but for its positions, which diffusers does not keep.

    Every block of diffusers' has a copy of the embeddings.
    """
    layout: dict[str, Rows] = {}
    thirds = [(part * model.hidden_size, (part + 1) * model.hidden_size) for part in range(3)]
    for parameter in ("weight", "bias"):
        for ours, theirs in _MODEL_MODULES.items():
            layout[f"{ours}.{parameter}"] = Rows(f"{theirs}.{parameter}")
        for block in range(model.num_layers):
            prefix, source = f"transformer_blocks.{block}", f"blocks.{block}"
            for ours, theirs in _BLOCK_MODULES.items():
                layout[f"{prefix}.{ours}.{parameter}"] = Rows(f"{source}.{theirs}.{parameter}")
            for projection, third in zip(_QKV, thirds, strict=True):
                layout[f"{prefix}.attn1.{projection}.{parameter}"] = Rows(
                    f"{source}.attn.qkv.{parameter}", (third,)
                )
    for block in range(model.num_layers):
        layout |= {f"transformer_blocks.{block}.{ours}": Rows(theirs) for ours, theirs in _EMBEDDINGS.items()}
    return layout
