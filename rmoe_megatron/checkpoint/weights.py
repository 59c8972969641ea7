"""The weights of a run, tensor by tensor, wherever they lie: in its own checkpoint or in that of its frozen base."""

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from rmoe_megatron.checkpoint.folders import CheckpointFolder, find_checkpoint, read_state
from rmoe_megatron.checkpoint.unpickling import read_metadata
from rmoe_megatron.config.loading import load_config
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.errors import UserError
from rmoe_megatron.files.foreign_errors import refusal
from rmoe_megatron.model.checks import check_described_model

# Prefixes of what is not a weight of the model.
NOT_WEIGHTS = ("optimizer.", "ema.", "rng.", "fp8.", "chained_")


@dataclass(frozen=True)
class TensorLocation:
    """A tensor in a checkpoint."""

    reader: "CheckpointReader"
    key: str

    @property
    def dtype(self) -> torch.dtype:
        """Return the data type on the disk."""
        return self.reader.tensors[self.key].properties.dtype

    def read(self) -> Tensor:
        """Load the whole tensor."""
        return self.reader.read(self.key)


class _Reader(FileSystemReader):
    """Reads the metadata once; torch's class reads it for every tensor."""

    @cached_property
    def _cached(self) -> Metadata:
        # The folder was checked when it was found; it may have changed since.
        metadata = read_metadata(Path(self.path))
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        return self._cached


class CheckpointReader:
    """Reads single tensors of a torch_dist checkpoint, put together from the shards that its ranks wrote."""

    def __init__(self, checkpoint: CheckpointFolder) -> None:
        self.path = checkpoint.path
        self._reader = _Reader(checkpoint.path)

    @cached_property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Shapes and dtypes by key."""
        metadata = self._reader.read_metadata().state_dict_metadata
        return {key: value for key, value in metadata.items() if isinstance(value, TensorStorageMetadata)}

    @cached_property
    def _bytes(self) -> int:
        return sum(file.stat().st_size for file in self.path.glob("*.distcp"))

    def read(self, key: str) -> Tensor:
        """Load the whole tensor ``key``.

        Raises:
            UserError: the files don't hold what the metadata says of it.
        """
        described = self.tensors[key]
        with refusal(f"{key} in {self.path} cannot be read"):
            if prod(described.size) > self._bytes:  # nothing is allocated for a tensor that cannot be there
                raise ValueError(f"its shape {tuple(described.size)} is larger than all files")
            tensor = torch.empty(described.size, dtype=described.properties.dtype)
            with warnings.catch_warnings(
                action="ignore"
            ):  # that it loads in a single process, as it is asked to
                dcp.load({key: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor


class RunWeights:
    """Where every weight of a run's model lies.

    Args:
        run_dir: the folder of a trained or imported run.
        step: checkpoint; None takes the newest complete one.
        averaged: the moving averages instead of the weights of the step.
        base: where the base lies if not where the run's configuration says.

    Raises:
        UserError: there is no complete checkpoint, its configuration describes no model, or the base is missing or
            another one than in training, or given for a run without a frozen one.
    """

    def __init__(
        self, run_dir: Path, step: int | None = None, averaged: bool = True, base: Path | None = None
    ) -> None:
        if not run_dir.is_dir():
            raise UserError(f"There is no run at {run_dir}; give the run_dir of an earlier run.")
        self.checkpoint = find_checkpoint(run_dir, step)
        self.config: RunConfig = load_config(self.checkpoint.path / "config.yaml", [])
        check_described_model(self.config, str(self.checkpoint.path / "config.yaml"))
        reader = CheckpointReader(self.checkpoint)
        names = [name for name in reader.tensors if not name.startswith(NOT_WEIGHTS)]
        self.locations: dict[str, TensorLocation] = {}
        fine_tuning = self.config.fine_tuning
        fingerprint = read_state(self.checkpoint.path).get("base_fingerprint")
        if base is not None and fingerprint is None:
            raise UserError(
                f"{run_dir} has no frozen base, its checkpoint holds all weights; leave --base {base} out."
            )
        if fine_tuning is not None and fingerprint is not None:
            base = base or Path(fine_tuning.base)
            base_weights = RunWeights(base)
            if base_weights.fingerprint() != fingerprint:
                raise UserError(
                    f"The weights in {base} are not those that {run_dir} was trained on (fingerprints differ); "
                    "give the original base."
                )
            self.locations |= base_weights.locations
        for name in names:
            average = f"ema.{name}"
            key = average if averaged and average in reader.tensors else name
            self.locations[name] = TensorLocation(reader, key)

    def by_reader(self) -> Iterator[tuple[CheckpointReader, dict[str, str]]]:
        """Iterate over checkpoints with their names and keys."""
        readers = {id(location.reader): location.reader for location in self.locations.values()}
        for reader in readers.values():
            yield (
                reader,
                {name: place.key for name, place in self.locations.items() if place.reader is reader},
            )

    def fingerprint(self) -> str:
        """Return the SHA-256 of names, shapes and values of all weights; independent of layout and files."""
        digest = hashlib.sha256()
        for name in sorted(self.locations):
            tensor = self.locations[name].read()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()
