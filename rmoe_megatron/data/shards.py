"""Random access to the samples of WebDataset tar shards.

A shard is scanned once for the position of its members; a sample is then read by seeking. Decoders are restricted to
PNG and JPEG images, text, JSON and plain numpy arrays of numbers: nothing from the data is ever unpickled.
"""

import io
import json
import logging
import os
import re
import stat
import tarfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from rmoe_megatron.errors import UserError

logger = logging.getLogger(__name__)


def _decode_image(content: bytes) -> np.ndarray:
    """Return uint8 [3, H, W]; other formats than PNG and JPEG are not tried, some of which start programs."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            if image.mode.startswith(("I", "F")):  # conversion would clip it
                raise ValueError(f"pixels of mode {image.mode}, which has more than 8 bits a channel")
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1).copy()


def _decode_array(content: bytes) -> np.ndarray:
    """Return the array of a .npy file; it shares the bytes and is read-only."""
    start = 10 + int.from_bytes(content[8:10], "little")
    shape, is_fortran, dtype = _array_header(content[:start])
    if dtype.kind not in "biuf":
        raise ValueError(f"an array of {dtype}, which is no type of real numbers")
    if min(shape, default=0) < 0 or len(content) - start != prod(shape) * dtype.itemsize:
        raise ValueError(f"not the content of an array of {dtype} {shape}")
    return np.frombuffer(content, dtype, offset=start).reshape(shape, order="F" if is_fortran else "C")


@lru_cache(maxsize=256)
def _array_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Parse a .npy header of format 1.0; cached because parsing costs more than reading, and few differ."""
    stream = io.BytesIO(header)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("not a .npy file of format 1.0")
    return np.lib.format.read_array_header_1_0(stream)


DECODERS: dict[str, Callable[[bytes], Any]] = {
    "png": _decode_image,
    "jpg": _decode_image,
    "jpeg": _decode_image,
    "txt": lambda content: content.decode("utf-8"),
    "json": json.loads,
    "cls": int,
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
        raise UserError(
            f"There is no shard folder {folder}; point the data setting at a folder of .tar shards."
        )
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise UserError(f"The folder {folder} has no .tar shards; build or download the data first.")
    return shards


def base_plus_ext(path: str) -> tuple[str | None, str]:
    """Split a member's path into the key of its sample and its extension, as WebDataset does; None is no sample's."""
    match = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", path)
    return (match[1], match[2]) if match else (None, "")


def index_shard(shard: Path) -> list[SampleLocation]:
    """Scan the headers of a shard.

    Of a damaged shard everything that can be found is kept; a warning says where the damage is and how many samples
    there are. Damage is what a sound archive cannot have: anything but members and the zeros at the end.

    Raises:
        UserError: it is no regular file or cannot be read.
    """
    samples: dict[str, SampleLocation] = {}
    damage: list[str] = []
    for member in _members(shard, damage):
        key, extension = base_plus_ext(member.name)
        if member.isfile() and key is not None and extension.rsplit(".", 1)[-1] in DECODERS:
            location = samples.setdefault(key, SampleLocation(shard, key))
            location.members[extension] = (member.offset_data, member.size)
    if not samples:
        damage.append("it holds no samples")
    if damage:
        places = "; ".join(damage[:3]) + (f"; {len(damage) - 3} more" if len(damage) > 3 else "")
        logger.warning(
            "Shard %s is damaged (%s); the %d samples found are used.", shard, places, len(samples)
        )
    return list(samples.values())


def _members(shard: Path, damage: list[str]) -> Iterator[tarfile.TarInfo]:
    """Yield the members whose headers pass their checksum; what else there is, is told to ``damage``."""
    end = 0  # of the members so far
    try:
        if not stat.S_ISREG(shard.stat().st_mode):  # opening a pipe would wait for its writer
            raise OSError(0, "it is no regular file")
        # Without ignore_zeros tarfile takes a damaged header, or zeros in the middle, for the end of the archive.
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
            size = file.seek(0, os.SEEK_END)
            for member in tar:
                if member.offset != end:
                    damage.append(f"no members in bytes {end} to {member.offset}")
                if not 0 <= member.size <= size - member.offset_data:
                    raise tarfile.ReadError(f"member {member.name} is cut off")
                end = tar.offset
                yield member
            if not _is_end_of_archive(file, end):
                damage.append(f"no header and no end of the archive at byte {end}")
    except OSError as error:
        raise UserError(
            f"The shard {shard} cannot be read ({error.strerror}); remove or replace it."
        ) from error
    except Exception as error:  # on damaged headers tarfile raises nearly anything
        damage.append(f"{error} at byte {end}")


def _is_end_of_archive(file: BinaryIO, offset: int) -> bool:
    """Whether from ``offset`` on there are zeros only, and at least one block of them."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    complete = len(block) == tarfile.BLOCKSIZE
    while block and not block.strip(b"\0"):
        block = file.read(1 << 20)
    return complete and not block


class ShardDataset(Dataset[Any]):
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
        self.locations = [
            location for shard in shards or list_shards(folder) for location in index_shard(shard)
        ]
        self.skipped = 0
        self._descriptors: dict[Path, int] = {}
        self.restrict(extensions)

    def restrict(self, extensions: list[str] | None) -> None:
        """Decode these members only and leave out the samples that lack one; None decodes all.

        Raises:
            UserError: no sample is left.
        """
        self.extensions = extensions
        self.shapes: dict[str, tuple[int, ...]] = {}
        wanted = set(extensions or ())
        self.keep(lambda members: wanted <= members, ", ".join(extensions or ["any"]))

    def keep(self, is_usable: Callable[[set[str]], bool], needed: str) -> None:
        """Leave out the samples whose members are not usable; a warning counts them.

        Args:
            is_usable: takes the extensions of a sample's members.
            needed: says which members a usable sample has.

        Raises:
            UserError: no sample is left.
        """
        found = len(self.locations)
        self.locations = [location for location in self.locations if is_usable(set(location.members))]
        if not self.locations:
            raise UserError(
                f"The shards in {self.folder} hold no samples with members {needed}; build the data again."
            )
        if len(self.locations) < found:
            left_out = found - len(self.locations)
            logger.warning(
                "%d of the %d samples in %s have no members %s; left out.",
                left_out,
                found,
                self.folder,
                needed,
            )

    def require_shapes_of_first(self) -> None:
        """From now on take a sample whose arrays differ in shape from the first sample's for unreadable."""
        arrays = {name: value for name, value in self[0].items() if isinstance(value, np.ndarray)}
        self.shapes = {name: array.shape for name, array in arrays.items()}

    def __len__(self) -> int:
        return len(self.locations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for attempt in range(len(self.locations)):
            location = self.locations[(index + attempt) % len(self.locations)]
            try:
                return self._read(location)
            except (OSError, ValueError) as error:
                self.skipped += 1
                logger.warning(
                    "Sample %s of %s cannot be read (%s); skipped, %d so far.",
                    location.key, location.shard, error, self.skipped,
                )  # fmt: skip
        raise UserError(
            f"None of the {len(self.locations)} samples in {self.folder} can be read; build the data again."
        )

    def _read(self, location: SampleLocation) -> dict[str, Any]:
        if location.shard not in self._descriptors:
            self._descriptors[location.shard] = os.open(location.shard, os.O_RDONLY)
        sample: dict[str, Any] = {"__key__": location.key}
        for extension in self.extensions or location.members:
            offset, size = location.members[extension]
            # pread has no file position, which forked workers would share.
            content = os.pread(self._descriptors[location.shard], size, offset)
            if len(content) != size:
                raise ValueError(f"{extension}: cut off")
            try:
                sample[extension] = DECODERS[extension.rsplit(".", 1)[-1]](content)
            except Exception as error:  # on damaged content the libraries raise nearly anything
                raise ValueError(f"{extension}: {error}") from error
            shape = self.shapes.get(extension)
            if shape is not None and sample[extension].shape != shape:
                raise ValueError(
                    f"{extension} has shape {sample[extension].shape}, the first sample's {shape}"
                )
        return sample


IMAGES = ("png", "jpg", "jpeg")
LATENTS, TEXT_HIDDEN_STATES, TEXT_POOLED = "latents.npy", "text_hidden_states.npy", "text_pooled.npy"
PRECOMPUTED_TEXT = {"text_hidden_states": TEXT_HIDDEN_STATES, "text_pooled": TEXT_POOLED}
CLASS_LABEL = "cls"


class TrainingDataset(Dataset[Any]):
    """Training samples of a shard folder, raw or precomputed; which one is read off the first sample.

    Raw samples are ``{"image": uint8 [3, H, W], "caption": str}``; precomputed ones float32 tensors ``latents``
    [C, H, W], ``text_hidden_states`` [L, D] and ``text_pooled`` [P]. For a class-conditional model
    ``class_labels``, an int, takes the place of caption and text.

    Args:
        num_classes: of a class-conditional model, 0 for text.
        shards: the shards of ``folder`` to use; None takes all.
    """

    def __init__(self, folder: Path, num_classes: int = 0, shards: list[Path] | None = None) -> None:
        self.samples = ShardDataset(folder, shards=shards)
        self.num_classes = num_classes
        members = self.samples.locations[0].members
        self.precomputed = LATENTS in members
        self.image_extension = next((name for name in IMAGES if name in members), "png")
        images = LATENTS if self.precomputed else self.image_extension
        text = list(PRECOMPUTED_TEXT.values()) if self.precomputed else ["txt"]
        self.samples.restrict([images, *([CLASS_LABEL] if num_classes else text)])
        self.samples.require_shapes_of_first()  # samples of a batch are stacked

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        return self._image(sample) | (self._label(sample) if self.num_classes else self._text(sample))

    def _image(self, sample: dict[str, Any]) -> dict[str, Any]:
        if self.precomputed:
            return {"latents": torch.from_numpy(sample[LATENTS].astype(np.float32))}
        return {"image": torch.from_numpy(sample[self.image_extension])}

    def _text(self, sample: dict[str, Any]) -> dict[str, Any]:
        if not self.precomputed:
            return {"caption": sample["txt"]}
        arrays = {name: sample[member].astype(np.float32) for name, member in PRECOMPUTED_TEXT.items()}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _label(self, sample: dict[str, Any]) -> dict[str, Any]:
        label = sample[CLASS_LABEL]
        if not 0 <= label < self.num_classes:
            raise UserError(
                f"Sample {sample['__key__']} of {self.samples.folder} has class {label}, but model.num_classes is "
                f"{self.num_classes}."
            )
        return {"class_labels": label}
