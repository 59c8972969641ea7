"""Anti-aliased drawing of shapes into small RGB images.

Coordinates are in pixels, x to the right and y downwards; the image spans [0, 32] in both and pixel (row i,
column j) is the square [j, j+1] x [i, i+1]. A shape's ``size`` is the side of its bounding box and
(x, y) is the box's center.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rmoe_megatron.data.shapes.vocabulary import BACKGROUND, COLORS, IMAGE_SIZE

SUPERSAMPLING = 8  # sample points per pixel side


@dataclass(frozen=True)
class ShapeObject:
    """One object of a scene; position and size in pixels."""

    shape: str
    color: str
    x: float
    y: float
    size: float


def inside(shape: str, u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Tell which points lie in the shape; (u, v) is relative to the box's center, in halves of its side."""
    across, down = np.abs(u), np.abs(v)
    if shape == "circle":
        return u * u + v * v <= 1
    if shape == "square":
        return np.maximum(across, down) <= 1
    if shape == "diamond":
        return across + down <= 1
    if shape == "cross":
        return (np.minimum(across, down) <= 1 / 3) & (np.maximum(across, down) <= 1)
    if shape == "triangle":
        return (2 * across <= v + 1) & (v <= 1)
    raise ValueError(f"unknown shape {shape!r}")


def coverage(
    shape: str, x: float, y: float, size: float, height: int = IMAGE_SIZE, width: int = IMAGE_SIZE
) -> NDArray[np.float32]:
    """Return the share of every pixel that the shape covers, [height, width] in [0, 1]."""
    result = np.zeros((height, width), dtype=np.float32)
    half = size / 2
    top, bottom = max(math.floor(y - half), 0), min(math.ceil(y + half), height)
    left, right = max(math.floor(x - half), 0), min(math.ceil(x + half), width)
    if top >= bottom or left >= right:
        return result
    u = (_sample_points(left, right) - np.float32(x)) / np.float32(half)
    v = (_sample_points(top, bottom) - np.float32(y)) / np.float32(half)
    hits = inside(shape, u[None, :], v[:, None])
    hits = hits.reshape(bottom - top, SUPERSAMPLING, right - left, SUPERSAMPLING)
    result[top:bottom, left:right] = hits.mean(axis=(1, 3), dtype=np.float32)
    return result


def _sample_points(start: int, stop: int) -> NDArray[np.float32]:
    points = start + (np.arange(SUPERSAMPLING * (stop - start)) + 0.5) / SUPERSAMPLING
    return points.astype(np.float32)


def render(objects: Iterable[ShapeObject]) -> NDArray[np.uint8]:
    """Return the image of the objects on the background, uint8 [32, 32, 3]; later ones cover earlier ones."""
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    image[:] = BACKGROUND
    for item in objects:
        alpha = coverage(item.shape, item.x, item.y, item.size)[..., None]
        image += alpha * (np.asarray(COLORS[item.color], dtype=np.float32) - image)
    return np.rint(image).astype(np.uint8)
