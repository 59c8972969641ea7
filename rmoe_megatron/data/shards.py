"""Random access to the samples of WebDataset tar shards.

A shard is scanned once for the position of its members; a sample is then read by seeking. Decoders are restricted to
images, text, JSON and plain numpy arrays: nothing from the data is ever unpickled.
"""

import io
import json
import logging
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from webdataset.tariterators import base_plus_ext

from rmoe_megatron.errors import UserError

logger = logging.getLogger(__name__)


def _decode_image(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1).copy()


def _decode_array(content: bytes) -> np.ndarray:
    return np.load(io.BytesIO(content), allow_pickle=False)


DECODERS: dict[str, Callable[[bytes], Any]] = {
    "png": _decode_image,
    "jpg": _decode_image,
    "jpeg": _decode_image,
    "txt": lambda content: content.decode("utf-8"),
    "json": json.loads,
    "npy": _decode_array,
}


@dataclass
class SampleLocation:
    """Where the members of one sample lie: extension -> (offset, size) in the shard."""

    shard: Path
    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


def list_shards(folder: Path) -> list[Path]:
    """Return the tar shards of a folder by name.

    Raises:
        UserError: the folder is missing or has no shards.
    """
    if not folder.is_dir():
        raise UserError(f"There is no shard folder {folder}; point the data setting at a folder of .tar shards.")
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise UserError(f"The folder {folder} has no .tar shards; build or download the data first.")
    return shards


def index_shard(shard: Path) -> list[SampleLocation]:
    """Scan the headers of a shard; of a damaged shard the samples before the damage are kept and a warning names it."""
    samples: dict[str, SampleLocation] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                key, extension = base_plus_ext(member.name)
                if not member.isfile() or key is None or extension.rsplit(".", 1)[-1] not in DECODERS:
                    continue
                if member.offset_data + member.size > shard.stat().st_size:
                    raise tarfile.ReadError(f"member {member.name} is cut off")
                location = samples.setdefault(key, SampleLocation(shard, key))
                location.members[extension] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        logger.warning("Shard %s is damaged (%s); its first %d samples are used.", shard, error, len(samples))
    return list(samples.values())


class ShardDataset(Dataset):
    """The samples of all shards of a folder, decoded, as dictionaries from extension to value.

    A sample that cannot be read is counted, named in the log and replaced by the next readable one, so that a run
    goes on and every layout sees the same replacement.

    Args:
        folder: folder of .tar shards.
        extensions: the members to decode; samples that lack one are left out. None decodes all.
        shards: the shards of ``folder`` to use; None takes all.

    Raises:
        UserError: the folder is missing or has no usable sample.
    """

    def __init__(
        self, folder: Path, extensions: list[str] | None = None, shards: list[Path] | None = None
    ) -> None:
        self.folder = folder
        self.extensions = extensions
        locations = [location for shard in shards or list_shards(folder) for location in index_shard(shard)]
        self.locations = [
            location for location in locations if extensions is None or set(extensions) <= set(location.members)
        ]
        if not self.locations:
            wanted = f" with members {', '.join(extensions)}" if extensions else ""
            raise UserError(f"The shards in {folder} hold no samples{wanted}; build the data again.")
        self.skipped = 0
        self._descriptors: dict[Path, int] = {}

    def __len__(self) -> int:
        return len(self.locations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for attempt in range(len(self.locations)):
            location = self.locations[(index + attempt) % len(self.locations)]
            try:
                return self._read(location)
            except (OSError, ValueError, SyntaxError) as error:
                self.skipped += 1
                logger.warning(
                    "Sample %s of %s cannot be read (%s); skipped, %d so far.",
                    location.key, location.shard, error, self.skipped,
                )  # fmt: skip
        raise UserError(f"None of the {len(self.locations)} samples in {self.folder} can be read; build the data again.")

    def _read(self, location: SampleLocation) -> dict[str, Any]:
        if location.shard not in self._descriptors:
            self._descriptors[location.shard] = os.open(location.shard, os.O_RDONLY)
        sample: dict[str, Any] = {"__key__": location.key}
        for extension in self.extensions or location.members:
            offset, size = location.members[extension]
            # pread has no file position, which forked workers would share.
            content = os.pread(self._descriptors[location.shard], size, offset)
            sample[extension] = DECODERS[extension.rsplit(".", 1)[-1]](content)
        return sample


LATENTS, TEXT_HIDDEN_STATES, TEXT_POOLED = "latents.npy", "text_hidden_states.npy", "text_pooled.npy"
PRECOMPUTED = {"latents": LATENTS, "text_hidden_states": TEXT_HIDDEN_STATES, "text_pooled": TEXT_POOLED}


class TrainingDataset(Dataset):
    """Training samples of a shard folder, raw or precomputed; which one is read off the first sample.

    Raw samples are ``{"image": uint8 [3, H, W], "caption": str}``; precomputed ones float32 tensors ``latents``
    [C, H, W], ``text_hidden_states`` [L, D] and ``text_pooled`` [P].
    """

    def __init__(self, folder: Path) -> None:
        first = index_shard(list_shards(folder)[0])
        self.precomputed = bool(first) and LATENTS in first[0].members
        self.image_extension = next((e for e in ("png", "jpg", "jpeg") if first and e in first[0].members), "png")
        wanted = list(PRECOMPUTED.values()) if self.precomputed else [self.image_extension, "txt"]
        self.samples = ShardDataset(folder, wanted)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        if self.precomputed:
            return {name: torch.from_numpy(sample[member]).float() for name, member in PRECOMPUTED.items()}
        return {"image": torch.from_numpy(sample[self.image_extension]), "caption": sample["txt"]}
