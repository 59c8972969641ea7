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

from rmoe_megatron.config.captions import CaptionSource
from rmoe_megatron.config.sample_filter import SampleFilter
from rmoe_megatron.data.archive import parse
from rmoe_megatron.data.decoding import DECODERS, Square, decode_image
from rmoe_megatron.data.index import IMAGES, LATENTS, LEFT_OUT, MEMBERS, Selection, index_shards, open_index
from rmoe_megatron.data.order import hashed
from rmoe_megatron.errors import UserError

logger = logging.getLogger(__name__)

MAX_OPEN_SHARDS = 256


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used, why, and the draw that asked for it or for one before it."""

    shard: str
    key: str
    reason: str
    draw: int


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
        sample_filter: which samples to take; None takes all.

    Raises:
        UserError: the folder is missing or has no usable sample.
    """

    def __init__(
        self,
        folder: Path,
        extensions: list[str] | None = None,
        shards: list[Path] | None = None,
        sample_filter: SampleFilter | None = None,
    ) -> None:
        self.folder = folder
        if shards is None:
            self.index = open_index(folder, sample_filter)
        else:
            self.index = index_shards(folder, shards, sample_filter)
        self.square: Square | None = None  # of the images; None leaves them as they are
        self.skipped = 0
        self._descriptors: dict[int, int] = {}
        self.restrict(extensions)

    def restrict(self, extensions: list[str] | None) -> None:
        """Decode these members only and leave out the samples that lack one; None decodes all.

        Raises:
            UserError: no sample is left.
        """
        self.extensions = extensions
        self.wanted: set[str] | None = None  # of the members that a sample happens to have; None decodes all
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
        passing = len(Selection(self.index, lambda members: LEFT_OUT not in members))
        self.selection = Selection(self.index, lambda members: LEFT_OUT not in members and is_usable(members))
        if not passing and len(self.index):
            raise UserError(
                f"data.filter takes none of the {len(self.index)} samples in {self.folder}; change it."
            )
        if not len(self):
            raise UserError(
                f"The shards in {self.folder} hold no samples with members {needed}; build the data again."
            )
        if len(self) < passing:
            logger.warning(
                "%d of the %d samples in %s have no members %s; left out.",
                passing - len(self),
                passing,
                self.folder,
                needed,
            )

    def require_shapes_of_first(self) -> None:
        """From now on take a sample whose arrays differ in shape from the first sample's for unreadable."""
        arrays = {name: value for name, value in self[0].items() if isinstance(value, np.ndarray)}
        self.shapes = {"image" if name in IMAGES else name: array.shape for name, array in arrays.items()}

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
            shard = self.shard(index)
            raise UserError(
                f"Sample {index} of {self.folder}, in {shard}, cannot be read ({error})."
            ) from error

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(index, lambda sample: sample)

    def read(
        self,
        index: int,
        use: Callable[[dict[str, Any]], dict[str, Any]],
        note: Callable[[int, Exception], None] | None = None,
    ) -> dict[str, Any]:
        """Return what ``use`` makes of a sample, or of the next one that can be read and of which it makes something.

        Args:
            use: raises ValueError for a sample that it cannot use.
            note: called with the index of every sample that cannot be read or used, and why; None warns of it.

        Raises:
            UserError: there is no such sample.
        """
        for attempt in range(len(self)):
            number = (index + attempt) % len(self)
            try:
                return use(self.decoded(number))
            except (OSError, ValueError) as error:
                why = error
                (note or self._warn)(number, error)
        raise UserError(
            f"None of the {len(self)} samples in {self.folder} can be read (the last: {why}); build the data again."
        )

    def _warn(self, index: int, error: Exception) -> None:
        self.skipped += 1
        logger.warning(
            "Sample %s of %s cannot be read (%s); skipped, %d so far.",
            self.name(index), self.shard(index), error, self.skipped,
        )  # fmt: skip

    def decoded(self, index: int) -> dict[str, Any]:
        """Return this sample and no other.

        Raises:
            OSError: it cannot be read.
            ValueError: it cannot be decoded.
        """
        location, contents = self._read(index)
        return self._decode(location.key, contents)

    def name(self, index: int) -> str:
        """Return a sample's key, or its number if its headers cannot be read."""
        try:
            return self._read(index)[0].key
        except (OSError, ValueError):
            return str(index)

    def shard(self, index: int) -> Path:
        """Return the shard of a sample."""
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
        return SampleLocation(self.shard(index), sample.key, members), contents

    def _descriptor(self, shard: int) -> int:
        """Return an open shard's descriptor; the shards that were opened longest ago are closed."""
        if shard not in self._descriptors:
            if len(self._descriptors) == MAX_OPEN_SHARDS:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[shard] = os.open(self.folder / self.index.shards[shard].name, os.O_RDONLY)
        return self._descriptors[shard]

    def _decode(self, key: str, contents: dict[str, memoryview]) -> dict[str, Any]:
        sample: dict[str, Any] = {"__key__": key}
        present = [name for name in contents if self.wanted is None or name in self.wanted]
        for extension in self.extensions or present:
            if extension not in contents:
                raise ValueError(f"{extension}: no such member")
            kind, content = extension.rsplit(".", 1)[-1], bytes(contents[extension])
            try:
                value = decode_image(content, self.square) if kind in IMAGES else DECODERS[kind](content)
            except Exception as error:  # on damaged content the libraries raise nearly anything
                raise ValueError(f"{extension}: {error}") from error
            shape = self.shapes.get("image" if kind in IMAGES else extension)
            if shape is not None and value.shape != shape:
                raise ValueError(f"{extension} has shape {value.shape}, the first sample's {shape}")
            sample[extension] = value
        return sample


TEXT_HIDDEN_STATES, TEXT_POOLED = "text_hidden_states.npy", "text_pooled.npy"
PRECOMPUTED_TEXT = {"text_hidden_states": TEXT_HIDDEN_STATES, "text_pooled": TEXT_POOLED}
CLASS_LABEL = "cls"


@dataclass(frozen=True)
class SampleFormat:
    """What a model takes of samples.

    Attributes:
        num_classes: of a class-conditional model, 0 for text.
        square: of raw images; None leaves them as they are.
        captions: where they are in raw samples.
        seed: of the run, which the choice among several captions depends on.
        filter: which raw samples to take; None takes all.
    """

    num_classes: int = 0
    square: Square | None = None
    captions: tuple[CaptionSource, ...] = (CaptionSource("txt"),)
    seed: int = 0
    filter: SampleFilter | None = None

    def takes(self, members: set[str]) -> bool:
        """Whether a raw sample of these members has an image, and a class or a caption."""
        if members.isdisjoint(IMAGES):
            return False
        if self.num_classes:
            return CLASS_LABEL in members
        return any(source.member in members for source in self.captions)

    @property
    def needed(self) -> str:
        """Return in words which members a raw sample has to have."""
        conditions = [CLASS_LABEL] if self.num_classes else [source.member for source in self.captions]
        return f"{' or '.join(dict.fromkeys(conditions))}, {' or '.join(IMAGES)}"

    def caption(self, sample: dict[str, Any], draw: int) -> str:
        """Return one of a raw sample's captions, by their weights; another draw may give another.

        Raises:
            ValueError: it has none.
        """
        found = [
            (text, source.weight)
            for source in self.captions
            if (text := _caption(sample, source)) is not None
        ]
        if not found:
            raise ValueError("its JSON has no caption")
        place = hashed(hashed(self.seed) ^ draw) / 2**64 * sum(weight for _, weight in found)
        for text, weight in found:
            place -= weight
            if place < 0:
                return text
        return found[-1][0]


def _caption(sample: dict[str, Any], source: CaptionSource) -> str | None:
    value = sample.get(source.member)
    if source.key is not None:
        value = value.get(source.key) if isinstance(value, dict) else None
    return value if isinstance(value, str) else None


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Return a stored array as a tensor: float16 as it is, which is half as much to hand from process to process."""
    return torch.from_numpy(array.astype(np.float16 if array.dtype == np.float16 else np.float32))


def image_of(sample: dict[str, Any]) -> np.ndarray:
    """Return the image of a decoded raw sample, uint8 [3, H, W]."""
    return next(sample[extension] for extension in IMAGES if extension in sample)


class TrainingDataset(Dataset[Any]):
    """Training samples of a shard folder, raw or precomputed; which one is read off the first sample.

    Raw samples are ``{"image": uint8 [3, H, W], "caption": str}``; precomputed ones float16 tensors
    (float32 if stored otherwise) ``latents`` [C, H, W], ``text_hidden_states`` [L, D] and ``text_pooled`` [P]. For a class-conditional model
    ``class_labels``, an int, takes the place of caption and text.

    Args:
        sample_format: what the model takes.
        shards: the shards of ``folder`` to use; None takes all.
    """

    def __init__(self, folder: Path, sample_format: SampleFormat, shards: list[Path] | None = None) -> None:
        self.samples = ShardDataset(folder, shards=shards, sample_filter=sample_format.filter)
        self.format = sample_format
        self.precomputed = LATENTS in self.samples.members(0)
        if self.precomputed and sample_format.filter is not None:
            raise UserError(
                f"{folder} holds precomputed samples, which data.filter does not know the pictures of; set it for "
                "`rmoe data precompute`, and null for training."
            )
        if self.precomputed:
            text = list(PRECOMPUTED_TEXT.values())
            self.samples.restrict([LATENTS, *([CLASS_LABEL] if sample_format.num_classes else text)])
        else:
            self.samples.square = sample_format.square
            self.samples.keep(sample_format.takes, sample_format.needed)
            self.samples.wanted = {
                *IMAGES,
                CLASS_LABEL,
                *(source.member for source in sample_format.captions),
            }
        self.samples.require_shapes_of_first()  # samples of a batch are stacked

    def __len__(self) -> int:
        return len(self.samples)

    def draw(self, index: int, draw: int, bad: list[BadSample] | None = None) -> dict[str, Any]:
        """Return the sample at ``index`` as the ``draw``-th draw of a run sees it.

        Args:
            bad: takes up what cannot be used; without it a warning is logged.

        Raises:
            UserError: no sample can be read, or its class is none of the model's.
        """

        def note(number: int, error: Exception) -> None:
            assert bad is not None
            shard, key = str(self.samples.shard(number)), self.samples.name(number)
            bad.append(BadSample(shard, key, str(error), draw))

        return self.samples.read(
            index,
            lambda sample: self._image(sample) | self._conditions(sample, draw),
            note if bad is not None else None,
        )

    def _image(self, sample: dict[str, Any]) -> dict[str, Any]:
        if self.precomputed:
            return {"latents": _tensor(sample[LATENTS])}
        return {"image": torch.from_numpy(image_of(sample))}

    def _conditions(self, sample: dict[str, Any], draw: int) -> dict[str, Any]:
        if self.format.num_classes:
            return self._label(sample)
        if not self.precomputed:
            return {"caption": self.format.caption(sample, draw)}
        return {name: _tensor(sample[member]) for name, member in PRECOMPUTED_TEXT.items()}

    def _label(self, sample: dict[str, Any]) -> dict[str, Any]:
        label, classes = sample[CLASS_LABEL], self.format.num_classes
        if not 0 <= label < classes:
            raise UserError(
                f"Sample {sample['__key__']} of {self.samples.folder} has class {label}, but model.num_classes is "
                f"{classes}."
            )
        return {"class_labels": label}
