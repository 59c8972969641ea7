"""Samples that somebody has made already: an archive in ADM's layout, or a folder of PNG files."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.imagenet.reference import StoredImages, open_images
from rmoe_megatron.files.foreign_errors import refusal
from rmoe_megatron.files.images import open_picture
from rmoe_megatron.inference.provenance import content_digest
from rmoe_megatron.pretrained.pipeline_folder import MODEL_INDEX


@dataclass(frozen=True)
class FolderOfSamples:
    """PNG files in the order of their numbers: ``0000.png``, or any other names and folders below."""

    files: list[Path]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.files)

    def digests(self, start: int, stop: int) -> list[str]:
        """Return a digest of the content of some of the files."""
        return [content_digest(path) for path in self.files[start:stop]]

    def images(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return some of the images, uint8 [N, H, W, 3].

        Raises:
            UserError: a file is no picture, or of another size than those before it.
        """
        read = [_pixels(path) for path in self.files[start:stop]]
        for path, pixels in zip(self.files[start:stop], read, strict=True):
            if pixels.shape != read[0].shape:
                raise UserError(
                    f"{path} has {pixels.shape[1]} x {pixels.shape[0]} pixels, but {self.files[start]} has "
                    f"{read[0].shape[1]} x {read[0].shape[0]}; samples are of one size."
                )
        return np.stack(read)


def open_given(model: Path) -> FolderOfSamples | StoredImages | None:
    """Return the samples that ``model`` holds, or None if it should be a model.

    Raises:
        UserError: it is an archive of something else, or a folder without pictures.
    """
    if model.suffix == ".npz":
        return open_images(model, "samples")
    if not model.is_dir() or (model / MODEL_INDEX).exists():
        return None
    files = sorted(model.rglob("*.png"), key=_by_number)
    if not files:
        raise UserError(f"{model} holds neither a diffusers folder ({MODEL_INDEX}) nor PNG files.")
    return FolderOfSamples(files)


def _by_number(path: Path) -> list[tuple[int, str]]:
    """Return a key that sorts 2.png before 10.png."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", str(path)) if part]


def _pixels(path: Path) -> NDArray[np.uint8]:
    with refusal(f"{path} cannot be read as a picture"), open_picture(path) as image:
        return np.asarray(image.convert("RGB"))
