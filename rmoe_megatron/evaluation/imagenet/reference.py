"""Archives of images in ADM's layout: its reference, and samples."""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.imagenet.metrics import Gaussian
from rmoe_megatron.files.foreign_errors import refusal
from rmoe_megatron.files.regular import check_regular
from rmoe_megatron.inference.fingerprints import file_digest


@dataclass(frozen=True)
class StoredImages:
    """Images uint8 [N, H, W, 3] of an archive, read in parts."""

    path: Path
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many there are."""
        return self.shape[0]

    def digests(self, start: int, stop: int) -> list[str]:
        """Return what tells some of the images from others: the whole file and their place in it."""
        return [f"{file_digest(self.path)} {start} {stop}"]

    def images(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return some of the images; the others are not kept in memory."""
        size = int(np.prod(self.shape[1:]))
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
            _read_header(member)
            member.seek(start * size, io.SEEK_CUR)
            content = member.read((min(stop, self.shape[0]) - start) * size)
        return np.frombuffer(content, dtype=np.uint8).reshape(-1, *self.shape[1:])


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(member)


@dataclass(frozen=True)
class Reference(StoredImages):
    """ADM's reference: its images, and their statistics if the file has them."""

    pool: Gaussian | None
    spatial: Gaussian | None


def open_images(path: Path, what: str) -> StoredImages:
    """Open the images of an archive in ADM's layout; nothing in it is unpickled.

    Args:
        what: what a message calls them.

    Raises:
        UserError: it is no regular file, or holds no images.
    """
    check_regular(path, follow=True)
    with (
        refusal(f"{path} cannot be read as {what}"),
        zipfile.ZipFile(path) as archive,
        archive.open("arr_0.npy") as member,
    ):
        shape, is_fortran, dtype = _read_header(member)
    if len(shape) != 4 or 0 in shape or dtype != np.uint8 or is_fortran or shape[-1] != 3:
        raise UserError(f"{path} holds no images uint8 [N, H, W, 3] under arr_0, as ADM's archives do.")
    return StoredImages(path, shape)


def open_reference(path: Path) -> Reference:
    """Open a reference npz; nothing in it is unpickled.

    Raises:
        UserError: there is no such file, or it holds no images.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path} (--reference); get ADM's VIRTUAL_imagenet256_labeled.npz.")
    stored = open_images(path, "a reference")
    with refusal(f"{path} cannot be read as a reference"), np.load(path, allow_pickle=False) as file:
        names = set(file.files)
        gaussians = [
            Gaussian(file[mean].astype(np.float64), file[covariance].astype(np.float64))
            if {mean, covariance} <= names
            else None
            for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s"))
        ]
    return Reference(path, stored.shape, *gaussians)
