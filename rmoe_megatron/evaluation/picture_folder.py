"""What a folder of pictures that is scored as it is holds and lacks: nothing is left out of a score in silence."""

import hashlib
import os
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rmoe_megatron.errors import UserError
from rmoe_megatron.files.foreign_errors import refusal
from rmoe_megatron.files.images import open_picture

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff"}
THREADS = 8  # that decode pictures


@dataclass(frozen=True)
class FolderReport:
    """Names of pictures, relative to their folder, by what is wrong with them.

    Attributes:
        wanted: how many there should be.
        black: all of whose pixels are 0, which is what values that are not finite become in a picture.
        too_many: beside pictures that are wanted and called like them, but more than were asked for.
        foreign: that belong to no prompt.
    """

    wanted: int
    missing: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    black: list[str] = field(default_factory=list)
    duplicate: list[str] = field(default_factory=list)
    of_another_size: list[str] = field(default_factory=list)
    too_many: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def problems(self) -> dict[str, list[str]]:
        """Return the names of all kinds that there are."""
        kinds = ("missing", "unreadable", "black", "duplicate", "of_another_size", "too_many", "foreign")
        return {kind: names for kind in kinds if (names := getattr(self, kind))}

    def sentence(self) -> str:
        """Return what is wrong, every kind with its number and its first picture."""
        said = {
            "missing": "it lacks {} of {wanted} images",
            "unreadable": "{} cannot be read",
            "black": "{} are black, as pictures of values that are not finite become",
            "duplicate": "{} are copies of others",
            "of_another_size": "{} are of another size than most",
            "too_many": "{} are more than were asked for",
            "foreign": "{} belong to no prompt",
        }
        return "; ".join(
            f"{said[kind].format(len(names), wanted=self.wanted)}, {names[0]} the first"
            for kind, names in self.problems().items()
        )


def require_pictures(
    wanted: Sequence[Path], folder: Path, allow_incomplete: bool, layout: Collection[Path] | None = None
) -> tuple[list[Path], FolderReport]:
    """Return the pictures of a folder that can be scored, and what is wrong with it.

    Args:
        wanted: the pictures that are to be scored.
        allow_incomplete: score what there is; otherwise all has to be right.
        layout: all pictures that the folder may hold; those that are wanted if it is None.

    Raises:
        UserError: something is wrong with the folder and that is not allowed, or there is nothing to score.
    """
    report = inspect_folder(wanted, folder, layout)
    if report.problems() and not allow_incomplete:
        raise UserError(
            f"{folder} cannot be scored as it is: {report.sentence()}. Put it right, give a diffusers folder to make the images with, "
            "or add --allow-incomplete to score those that are there, with the others counted in the result."
        )
    left_out = {*report.missing, *report.unreadable}
    usable = [path for path in wanted if str(path.relative_to(folder)) not in left_out]
    if not usable:
        raise UserError(
            f"{folder} holds none of the {len(wanted)} images, {wanted[0].relative_to(folder)} the first."
        )
    return usable, report


def inspect_folder(
    wanted: Sequence[Path], folder: Path, layout: Collection[Path] | None = None
) -> FolderReport:
    """Look at every picture of a folder; see :func:`require_pictures`."""
    report = FolderReport(len(wanted))
    there = [path for path in wanted if path.is_file()]
    report.missing.extend(_name(path, folder) for path in wanted if not path.is_file())
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as threads:
        seen = dict(zip(there, threads.map(_look, there), strict=True))
    report.unreadable.extend(_name(path, folder) for path, look in seen.items() if look is None)
    looks = {path: look for path, look in seen.items() if look is not None}
    report.black.extend(_name(path, folder) for path, look in looks.items() if look.is_black)
    sizes = Counter(look.size for look in looks.values())
    usual = sizes.most_common(1)[0][0] if sizes else None
    first = dict[str, Path]()
    for path, look in looks.items():
        if look.size != usual:
            report.of_another_size.append(f"{_name(path, folder)} ({look.size[0]} x {look.size[1]})")
        if first.setdefault(look.digest, path) != path:
            report.duplicate.append(f"{_name(path, folder)} (as {_name(first[look.digest], folder)})")
    known = {*wanted, *(layout or ())}
    folders = {path.parent for path in known}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path not in known:
            is_numbered = path.parent in folders and path.stem.isdigit()
            (report.too_many if is_numbered else report.foreign).append(_name(path, folder))
    return report


@dataclass(frozen=True)
class _Look:
    size: tuple[int, int]
    digest: str
    is_black: bool


def _look(path: Path) -> _Look | None:
    """Decode a picture; returns None if that is not possible."""
    try:
        with refusal(str(path)), open_picture(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except UserError:
        return None
    height, width = pixels.shape[:2]
    # The size as well: the same bytes can be a picture that is wide and one that is high.
    digest = hashlib.sha256(pixels.tobytes() + f"{width} x {height}".encode()).hexdigest()
    return _Look((width, height), digest, not pixels.any())


def _name(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder))
