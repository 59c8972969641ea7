"""Weights in diffusers' safetensors files, read and written tensor by tensor."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Protocol, TypedDict

from diffusers import ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import split_torch_state_dict_into_shards
from pydantic import Field, TypeAdapter, with_config
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rmoe_megatron.errors import UserError
from rmoe_megatron.regular_files import check_regular
from rmoe_megatron.typed_files import OPEN, read_json, shown

MAX_SHARD_SIZE = "5GB"
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]B)", re.IGNORECASE)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
FLOATING = ("F64", "F32", "F16", "BF16")
MAX_PROBLEMS = 5  # tensors that a message names


@with_config(OPEN)
class Index(TypedDict):
    """What says in which of several files a tensor lies."""

    weight_map: Annotated[
        dict[str, Annotated[str, Field(pattern=r"^\w[\w.-]*\.safetensors$")]], Field(min_length=1)
    ]


INDEX = TypeAdapter(Index)


class WeightSource(Protocol):
    """Tensors under diffusers' names, loaded one at a time."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor:
        """Load one tensor."""
        ...


class SafetensorsFolder:
    """The weights of a model folder, in one file or in several.

    Args:
        single: name of the file if there is one; diffusers' or transformers'.

    Raises:
        UserError: there are no weights, a file cannot be read, or a tensor is not of floating point.
    """

    def __init__(self, folder: Path, single: str = SAFETENSORS_WEIGHTS_NAME) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for path in _weight_files(folder, single):
            check_regular(path)
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118  # no mapping
                        part = file.get_slice(name)
                        self.shapes[name] = tuple(part.get_shape())
                        self._files[name] = path
                        if single == SAFETENSORS_WEIGHTS_NAME and part.get_dtype() not in FLOATING:
                            raise UserError(
                                f"{path} has {name} of type {part.get_dtype()}; weights are {', '.join(FLOATING)}."
                            )
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read ({error}); download it again.") from error

    def read(self, name: str) -> Tensor:
        """Load one tensor."""
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)


def _weight_files(folder: Path, single: str) -> list[Path]:
    index = folder / f"{single}.index.json"
    if index.exists():
        # Plain names alone: diffusers would unpickle a shard of another kind.
        names = set(read_json(index, INDEX)["weight_map"].values())
        return [folder / name for name in sorted(names)]
    if (folder / single).exists():
        return [folder / single]
    variants = sorted(folder.glob(f"{single.partition('.')[0]}.*.safetensors"))
    if len(variants) == 1:
        return variants
    raise UserError(f"There is no {single} (or its index) in {folder}.")


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
    problems += [f"unexpected {shown(name)[1:-1]}" for name in source.shapes if name not in expected]
    problems += [
        f"{name} has shape {source.shapes[name]} instead of {shape}"
        for name, shape in expected.items()
        if source.shapes.get(name, shape) != shape
    ]
    if problems:
        raise UserError(f"{where} does not hold the weights of its architecture: {list_problems(problems)}.")


def list_problems(problems: list[str]) -> str:
    """Return the first of several problems with tensors, and how many more there are."""
    more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
    return "; ".join([*problems[:MAX_PROBLEMS], *more])


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

    Raises:
        UserError: a tensor has another shape than in the model.
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
            if tensors[name].shape != empty[name].shape:
                found, expected = tuple(tensors[name].shape), tuple(empty[name].shape)
                raise UserError(f"{name} has shape {found}, but its model in {folder} needs {expected}.")
            done += 1
            if progress is not None:
                progress(done, len(empty))
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        path = folder / f"{SAFETENSORS_WEIGHTS_NAME}.index.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
