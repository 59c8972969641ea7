"""Weights in diffusers' safetensors files, read and written tensor by tensor."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from diffusers import ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rmoe_megatron.errors import UserError

MAX_SHARD_SIZE = "5GB"
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]B)", re.IGNORECASE)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class WeightSource(Protocol):
    """Tensors under diffusers' names, loaded one at a time."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor:
        """Load one tensor."""
        ...


class SafetensorsFolder:
    """The weights of a diffusers model folder, in one file or in several.

    Raises:
        UserError: there are no weights, or a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for path in _weight_files(folder):
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118  # no mapping
                        self.shapes[name] = tuple(file.get_slice(name).get_shape())
                        self._files[name] = path
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read ({error}); download it again.") from error

    def read(self, name: str) -> Tensor:
        """Load one tensor."""
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / f"{SAFETENSORS_WEIGHTS_NAME}.index.json"
    single = folder / SAFETENSORS_WEIGHTS_NAME
    if index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index} is no index of safetensors files; download it again.") from error
        return [folder / Path(name).name for name in sorted(names)]
    if single.is_file():
        return [single]
    variants = sorted(folder.glob("diffusion_pytorch_model.*.safetensors"))
    if len(variants) == 1:
        return variants
    raise UserError(f"There is no {SAFETENSORS_WEIGHTS_NAME} (or its index) in {folder}.")


def check_tensors(source: WeightSource, model: ModelMixin, where: str) -> None:
    """Check that a source has exactly the tensors of a model.

    Args:
        model: may lie on the meta device.
        where: what the error message calls the source.

    Raises:
        UserError: lists missing, unexpected and misshapen tensors by name.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [f"missing {name}" for name in expected if name not in source.shapes]
    problems += [f"unexpected {name}" for name in source.shapes if name not in expected]
    problems += [
        f"{name} has shape {source.shapes[name]} instead of {shape}"
        for name, shape in expected.items()
        if source.shapes.get(name, shape) != shape
    ]
    if problems:
        raise UserError(f"{where} does not hold the weights of its architecture: {'; '.join(problems)}.")


def parse_size(size: str) -> int:
    """Return the bytes that a size like ``5GB`` stands for.

    Raises:
        UserError: it is none, or less than a byte.
    """
    found = _SIZE.fullmatch(size.strip())
    count = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if count < 1:
        raise UserError(
            f"--max-shard-size {size} must be a number greater than 0 with KB, MB, GB or TB, as {MAX_SHARD_SIZE}."
        )
    return count


def write_model(
    model: ModelMixin,
    read: Callable[[str], Tensor],
    folder: Path,
    max_shard_bytes: int = parse_size(MAX_SHARD_SIZE),
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a diffusers model folder as ``save_pretrained`` does, with one file's tensors in memory at a time.

    Args:
        model: gives names, shapes, data types and the configuration; may lie on the meta device.
        read: returns the tensor of a name.
        max_shard_bytes: weights above it are written as several files.
    """
    model.save_config(folder)
    empty = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    pattern = SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(
        empty, filename_pattern=pattern, max_shard_size=max_shard_bytes
    )
    done = 0
    for file, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            tensors[name] = read(name)
            done += 1
            if progress is not None:
                progress(done, len(empty))
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        path = folder / f"{SAFETENSORS_WEIGHTS_NAME}.index.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
