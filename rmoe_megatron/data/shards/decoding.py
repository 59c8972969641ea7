"""Members of samples from their bytes: PNG, JPEG, WebP and AVIF images, text, JSON, classes, plain arrays; nothing is unpickled."""

import codecs
import io
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from rmoe_megatron.config.buckets import Bucket
from rmoe_megatron.data.shards.colours import as_rgb, note_transparent_colour
from rmoe_megatron.files.images import FORMATS

MAX_TEXT = {"txt": 1 << 20, "caption": 1 << 20, "json": 1 << 24, "cls": 64}  # bytes of a member that is text
# How files of formats begin that are not taken, for the message.
MARKS = {
    "a TIFF picture": rb"II\*\0|MM\0\*|II\+\0|MM\0\+",
    "a GIF picture": rb"GIF8[79]a",
    "a BMP picture": rb"BM.{12}",
    "a HEIC picture": rb".{4}ftyp(heic|heix|heim|heis|mif1|msf1|hevc)",
    "a JPEG XL picture": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "a JPEG 2000 picture": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "a Photoshop picture": rb"8BPS",
    "an OpenEXR picture": rb"\x76\x2f\x31\x01",
    "an HDR picture": rb"#\?(RADIANCE|RGBE)",
    "a PNM or PFM picture": rb"P[1-7fF]\s",
    "an icon": rb"\0\0[\1\2]\0",
    "an SVG drawing": rb"\s*(<\?xml.{0,1000})?(<!--.{0,1000})?(<!DOCTYPE svg.{0,1000})?<svg",
    "a PDF document": rb"%PDF-",
    "an HTML page": rb"\s*<(!doctype html|html|!DOCTYPE html|HTML)",
    "an empty file": rb"\Z",
}
# At least so many times the size of the bucket is decoded of a JPEG. libjpeg's half of a picture that is three times the bucket differs
# from all of it, resized, by less than a quarter of what storing the result as a JPEG of quality 95 would change (the tests hold it).
LEFT_TO_RESIZE = 1.5
# EXIF's orientations, by what makes an upright picture of the stored one: its sides are exchanged, or its rows or columns run backwards.
TURNED, MIRRORED_ROWS, MIRRORED_COLUMNS = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)
BFLOAT16 = np.dtype("V2")  # numpy has no bfloat16: two bytes without a type


@dataclass(frozen=True)
class Crop:
    """The part of a picture that is kept, in pixels of the upright picture; it is resized to its bucket."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class View:
    """Which part of a picture is seen.

    Attributes:
        place: from 0, the left or the top, to 1; the middle is 0.5.
        flipped: left and right are exchanged.
        drawn: ``place`` is a random number inside (0, 1), by which every whole pixel is as likely as any other.
    """

    place: float = 0.5
    flipped: bool = False
    drawn: bool = False

    def crop(self, width: int, height: int, bucket: Bucket) -> Crop:
        """Return the largest part here of a picture that has the bucket's aspect ratio, to the next whole pixel."""
        if width * bucket.height > height * bucket.width:
            kept = max(round(height * bucket.aspect_ratio), 1)
            return Crop(self._first(width - kept), 0, kept, height)
        kept = max(round(width / bucket.aspect_ratio), 1)
        return Crop(0, self._first(height - kept), width, kept)

    def _first(self, left_over: int) -> int:
        """Return where the part begins that is kept, of pixels that are not."""
        return int((left_over + 1) * self.place) if self.drawn else int(left_over * self.place)


MIDDLE = View()


@dataclass(frozen=True)
class Decoded:
    """Where an upright picture lies in the pixels that were decoded of it.

    Attributes:
        scale: 1, 2, 4 or 8 pixels of a side of the picture are one that was decoded.
        left: decoded pixels, less than one, before the picture's first column.
        top: the same of its first row.
        width: the width of the whole picture, in its own pixels.
        height: likewise.
    """

    scale: int
    left: float
    top: float
    width: int
    height: int

    @classmethod
    def whole(cls, image: Image.Image) -> "Decoded":
        """Return that of an opened picture of which every pixel is decoded."""
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in TURNED
        width, height = reversed(image.size) if turned else image.size
        return cls(1, 0.0, 0.0, width, height)

    def box(self, crop: Crop) -> tuple[float, float, float, float]:
        """Return the left, upper, right and lower edge of a part of the picture in decoded pixels."""
        left, top = self.left + crop.left / self.scale, self.top + crop.top / self.scale
        return left, top, left + crop.width / self.scale, top + crop.height / self.scale


def decode_image(
    content: bytes, bucket: Bucket | None = None, upscale: bool = False, view: View = MIDDLE
) -> np.ndarray:
    """Return a picture as uint8 RGB, [3, H, W], or a view of it in the size of ``bucket``.

    It is turned upright as its EXIF data say, and becomes RGB as :func:`rmoe_megatron.data.shards.colours.as_rgb` does it. Of a photograph with
    further pictures inside (MPO, as telephones and cameras make them) the first is taken. Other formats are not tried.

    Raises:
        ValueError: it is of another format, an animation, or smaller than ``bucket`` and not to be enlarged.
        Exception: Pillow cannot read it, or it is larger than Pillow's limit against decompression bombs.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with _opened(content) as image:
            if image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:
                raise ValueError(f"an animation of {frames} pictures")
            note_transparent_colour(image)
            decoded = Decoded.whole(image) if bucket is None else _draft(image, bucket)
            # In its place: a copy of a large photograph takes as long as resizing it.
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
            upright = as_rgb(image)
    if bucket is not None:
        upright = _fitted(upright, decoded, bucket, upscale, view)
    if view.flipped:
        upright = ImageOps.mirror(upright)
    return np.asarray(upright).transpose(2, 0, 1).copy()


def _opened(content: bytes) -> Image.Image:
    """Open a picture; its pixels are not read.

    Raises:
        ValueError: it is none of the formats that are taken; says which one it is.
    """
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as error:
        kind = next(
            (name for name, mark in MARKS.items() if re.match(mark, content, re.DOTALL)), "no picture"
        )
        raise ValueError(f"it is {kind}; PNG, JPEG, WebP and AVIF are taken") from error


def decode_text(content: bytes) -> str:
    """Return text of UTF-8, or of UTF-16 with a byte-order mark, as Windows calls Unicode; the mark is none of the text.

    Raises:
        ValueError: it is neither.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return content.decode("utf-16")
        except UnicodeDecodeError as error:
            raise ValueError("it is no UTF-16 text, which its first two bytes say") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no UTF-8 text (byte {error.start} is none)") from error


def _draft(image: Image.Image, bucket: Bucket) -> Decoded:
    """Have libjpeg decode a JPEG at a half, a quarter or an eighth of its size, if that leaves enough to resize to ``bucket``.

    It takes less than half of the time. A picture on its side has the sides of the bucket the other way round, so that the longer one has
    to be enough for both.
    """
    whole = Decoded.whole(image)
    if not isinstance(image, JpegImageFile):
        return whole
    kept = LEFT_TO_RESIZE * max(bucket.width, bucket.height) / min(image.size)
    stored_width, stored_height = image.size
    drafted = image.draft(image.mode, (ceil(stored_width * kept), ceil(stored_height * kept)))
    if drafted is None:
        return whole
    scale = round(stored_width / drafted[1][2])
    # Turned and mirrored pictures have the last, partial pixel of a row or column first.
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    width, height = image.size if orientation not in TURNED else reversed(image.size)
    return Decoded(
        scale,
        width - whole.width / scale if orientation in MIRRORED_ROWS else 0.0,
        height - whole.height / scale if orientation in MIRRORED_COLUMNS else 0.0,
        whole.width,
        whole.height,
    )


def _fitted(image: Image.Image, decoded: Decoded, bucket: Bucket, upscale: bool, view: View) -> Image.Image:
    width, height = decoded.width, decoded.height
    if (width < bucket.width or height < bucket.height) and not upscale:
        raise ValueError(
            f"{width} x {height} pixels, smaller than the model's {bucket.width} x {bucket.height} (data.upscale=true "
            "enlarges pictures)"
        )
    # One step: the resized whole of a picture of 1 x 10000 would be huge.
    box = decoded.box(view.crop(width, height, bucket))
    return image.resize((bucket.width, bucket.height), Image.Resampling.BICUBIC, box)


def _decode_array(content: bytes) -> np.ndarray:
    """Return the array of a .npy file; it shares the bytes and is read-only."""
    start = 10 + int.from_bytes(content[8:10], "little")
    shape, is_fortran, dtype = _array_header(content[:start])
    if dtype == BFLOAT16:
        dtype = np.dtype("<u2")
        return (
            np.frombuffer(content, dtype, offset=start)
            .reshape(shape, order="F" if is_fortran else "C")
            .view(BFLOAT16)
        )
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
    "png": decode_image,
    "jpg": decode_image,
    "jpeg": decode_image,
    "webp": decode_image,
    "avif": decode_image,
    "txt": decode_text,
    "caption": decode_text,
    "json": json.loads,
    "cls": lambda content: int(decode_text(content)),
    "npy": _decode_array,
}
