"""Random access to the samples of WebDataset tar shards, over the index of their folder."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from rmoe_megatron.data.archive import parse
from rmoe_megatron.data.decoding import DECODERS
from rmoe_megatron.data.index import IMAGES, LATENTS, MEMBERS, Selection, index_shards, open_index
from rmoe_megatron.errors import UserError

logger = logging.getLogger(__name__)

MAX_OPEN_SHARDS = 256


@dataclass(frozen=True)
class SampleLocation:
    """Where the members of one sample lie: extension -> (offset, size) in the shard."""

    shard: Path
    key: str
    members: dict[str, tuple[int, int]]


class ShardDataset(Dataset[Any]):
    """The samples of all shards of a folder, decoded, as dictionaries from extension to value.

    A sample that cannot be read is counted, named in the log and replaced by the next readable one, so that a run
    goes on and every layout sees the same replacement.

    Args:
        folder: folder of .tar shards.
        extensions: the members to decode; samples that lack one are left out. None decodes all.
        shards: the shards of ``folder`` to use, which are scanned; None takes all, by the folder's index.

    Raises:
        UserError: the folder is missing or has no usable sample.
    """

    def __init__(
        self, folder: Path, extensions: list[str] | None = None, shards: list[Path] | None = None
    ) -> None:
        self.folder = folder
        self.index = open_index(folder) if shards is None else index_shards(folder, shards)
        self.skipped = 0
        self._descriptors: dict[int, int] = {}
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
        self.selection = Selection(self.index, is_usable)
        if not len(self):
            raise UserError(
                f"The shards in {self.folder} hold no samples with members {needed}; build the data again."
            )
        if len(self) < len(self.index):
            logger.warning(
                "%d of the %d samples in %s have no members %s; left out.",
                len(self.index) - len(self),
                len(self.index),
                self.folder,
                needed,
            )

    def require_shapes_of_first(self) -> None:
        """From now on take a sample whose arrays differ in shape from the first sample's for unreadable."""
        arrays = {name: value for name, value in self[0].items() if isinstance(value, np.ndarray)}
        self.shapes = {name: array.shape for name, array in arrays.items()}

    def __len__(self) -> int:
        return len(self.selection)

    def members(self, index: int) -> list[str]:
        """Return the extensions of a sample's members, as the index has them; nothing is read."""
        return self.index.kinds[self.index.records[self.selection[index]]["kind"]].members

    def locate(self, index: int) -> SampleLocation:
        """Read where the members of a sample lie.

        Raises:
            UserError: its headers cannot be read.
        """
        try:
            return self._read(index)[0]
        except (OSError, ValueError) as error:
            shard = self._shard(index)
            raise UserError(
                f"Sample {index} of {self.folder}, in {shard}, cannot be read ({error})."
            ) from error

    def __getitem__(self, index: int) -> dict[str, Any]:
        for attempt in range(len(self)):
            number, key = (index + attempt) % len(self), ""
            try:
                location, contents = self._read(number)
                key = location.key
                return self._decode(key, contents)
            except (OSError, ValueError) as error:
                self.skipped += 1
                logger.warning(
                    "Sample %s of %s cannot be read (%s); skipped, %d so far.",
                    key or number, self._shard(number), error, self.skipped,
                )  # fmt: skip
        raise UserError(
            f"None of the {len(self)} samples in {self.folder} can be read; build the data again."
        )

    def _shard(self, index: int) -> Path:
        return self.folder / self.index.shards[self.index.records[self.selection[index]]["shard"]].name

    def _read(self, index: int) -> tuple[SampleLocation, dict[str, memoryview]]:
        """Read the headers and contents of a sample's members in one go."""
        record = self.index.records[self.selection[index]]
        shard, offset, size = int(record["shard"]), int(record["offset"]), int(record["size"])
        # pread has no file position, which forked workers would share.
        content = memoryview(os.pread(self._descriptor(shard), size, offset))
        if len(content) != size:
            raise ValueError("cut off")
        sample = parse(content, offset)
        members = {
            name: place for name, place in sample.members.items() if name.rsplit(".", 1)[-1] in MEMBERS
        }
        contents = {name: content[start - offset :][:length] for name, (start, length) in members.items()}
        return SampleLocation(self._shard(index), sample.key, members), contents

    def _descriptor(self, shard: int) -> int:
        """Return an open shard's descriptor; the shards that were opened longest ago are closed."""
        if shard not in self._descriptors:
            if len(self._descriptors) == MAX_OPEN_SHARDS:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[shard] = os.open(self.folder / self.index.shards[shard].name, os.O_RDONLY)
        return self._descriptors[shard]

    def _decode(self, key: str, contents: dict[str, memoryview]) -> dict[str, Any]:
        sample: dict[str, Any] = {"__key__": key}
        for extension in self.extensions or contents:
            if extension not in contents:
                raise ValueError(f"{extension}: no such member")
            try:
                sample[extension] = DECODERS[extension.rsplit(".", 1)[-1]](bytes(contents[extension]))
            except Exception as error:  # on damaged content the libraries raise nearly anything
                raise ValueError(f"{extension}: {error}") from error
            shape = self.shapes.get(extension)
            if shape is not None and sample[extension].shape != shape:
                raise ValueError(
                    f"{extension} has shape {sample[extension].shape}, the first sample's {shape}"
                )
        return sample


TEXT_HIDDEN_STATES, TEXT_POOLED = "text_hidden_states.npy", "text_pooled.npy"
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
        members = self.samples.members(0)
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
