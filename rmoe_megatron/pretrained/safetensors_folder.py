"""Weights in diffusers' safetensors files, read and written tensor by tensor."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from diffusers import ModelMixin
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rmoe_megatron.errors import UserError
from rmoe_megatron.files.regular import check_regular
from rmoe_megatron.files.untrusted import shown
from rmoe_megatron.pretrained.model_files import DIFFUSERS_WEIGHTS, weights_in

MAX_SHARD_SIZE = "5GB"
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]B)", re.IGNORECASE)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
FLOATING = ("F64", "F32", "F16", "BF16")
MAX_PROBLEMS = 5  # tensors that a message names


class WeightSource(Protocol):
    """Tensors under diffusers' names, loaded one at a time."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor:
        """Load one tensor."""
        ...


class SafetensorsFiles:
    """Weights in one file or in several.

    Args:
        only_floating: refuse tensors of other types.
        follow: the user names these files, which may then be links to anywhere.

    Attributes:
        shapes: the shape of every tensor.
        dtypes: the data type of every tensor, as safetensors calls it.

    Raises:
        UserError: a file cannot be read, or a tensor is not of floating point.
    """

    def __init__(self, files: Sequence[Path], only_floating: bool = True, follow: bool = False) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        for path in files:
            check_regular(path, follow=follow)
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118  # no mapping
                        part = file.get_slice(name)
                        self.shapes[name] = tuple(part.get_shape())
                        self.dtypes[name] = part.get_dtype()
                        self._files[name] = path
                        if only_floating and part.get_dtype() not in FLOATING:
                            raise UserError(
                                f"{path} has {name} of type {part.get_dtype()}; weights are {', '.join(FLOATING)}."
                            )
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read ({error}); download it again.") from error

    def read(self, name: str) -> Tensor:
        """Load one tensor."""
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)


class SafetensorsFolder(SafetensorsFiles):
    """The weights that diffusers or transformers load from a model's folder.

    Args:
        single: name of the file if there is one; diffusers' or transformers'.

    Attributes:
        variant: whose name the files have, if any.

    Raises:
        UserError: there are no weights, a file cannot be read, or a tensor is not of floating point.
    """

    def __init__(self, folder: Path, single: str = DIFFUSERS_WEIGHTS) -> None:
        weights = weights_in(folder, single)
        self.variant = weights.variant
        super().__init__([folder / name for name in weights.files], only_floating=single == DIFFUSERS_WEIGHTS)


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
    record: dict[str, str] | None = None,
) -> None:
    """Write a diffusers model folder as ``save_pretrained`` does, with one file's tensors in memory at a time.

    Args:
        model: gives names, shapes, data types and the configuration; may lie on the meta device.
        read: returns the tensor of a name.
        max_shard_bytes: weights above it are written as several files.
        record: what every file says of itself in its header, beside its format.

    Raises:
        UserError: a tensor has another shape than in the model.
    """
    model.save_config(folder)
    empty = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    pattern = DIFFUSERS_WEIGHTS.replace(".safetensors", "{suffix}.safetensors")
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
        save_file(tensors, folder / file, metadata={"format": "pt", **(record or {})})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        path = folder / f"{DIFFUSERS_WEIGHTS}.index.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
