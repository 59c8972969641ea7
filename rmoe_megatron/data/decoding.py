"""Members of samples from their bytes: PNG and JPEG images, text, JSON, classes, plain arrays; nothing is unpickled."""

import io
import json
import warnings
from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
from PIL import Image


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
