"""Finds the objects of a toy shapes image without learned weights.

Foreground pixels differ from the background; every connected component is one object. Its color is the nearest color of
the palette, its shape the one whose rendering with the component's area and centroid overlaps it best.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from rmoe_megatron.data.shapes.render import coverage
from rmoe_megatron.data.shapes.vocabulary import BACKGROUND, COLORS, SHAPES

FOREGROUND_DISTANCE = 60.0  # RGB distance from the background, of 442 at most
MIN_AREA = 12.0  # pixels; the smallest object of the set covers 40
MIN_OVERLAP = 0.7  # intersection over union below which a component is no known shape
UNKNOWN = "unknown"

_BACKGROUND = np.asarray(BACKGROUND, dtype=np.float32)
_PALETTE = np.asarray(list(COLORS.values()), dtype=np.float32)
# Area of a shape over that of its box, and distance of its centroid below the box's center over the box's side.
_AREA = {"circle": math.pi / 4, "square": 1.0, "triangle": 0.5, "cross": 5 / 9, "diamond": 0.5}
_CENTROID = {"triangle": 1 / 6}


@dataclass(frozen=True)
class Detection:
    """One object: its shape (or "unknown"), color, box in pixels and how well it matches the shape, from 0 to 1."""

    shape: str
    color: str
    x: float
    y: float
    width: float
    height: float
    score: float


def detect(image: NDArray[np.uint8]) -> list[Detection]:
    """Return the objects of an image uint8 [H, W, 3], best match first."""
    difference = image.astype(np.float32) - _BACKGROUND
    distance = np.sqrt((difference**2).sum(axis=-1))
    labels, count = ndimage.label(distance > FOREGROUND_DISTANCE, structure=np.ones((3, 3)))
    found = [_classify(difference, distance, labels == number) for number in range(1, count + 1)]
    return sorted((item for item in found if item is not None), key=lambda item: -item.score)


def _classify(
    difference: NDArray[np.float32], distance: NDArray[np.float32], component: NDArray[np.bool_]
) -> Detection | None:
    core = component & (distance >= 0.8 * np.percentile(distance[component], 90))
    mean = difference[core].mean(axis=0)
    color = int(((mean + _BACKGROUND - _PALETTE) ** 2).sum(axis=-1).argmin())
    # Edge pixels are a blend of object and background; the blend's weight is the share the object covers.
    around = ndimage.binary_dilation(component, structure=np.ones((3, 3)))
    covered = np.clip(difference @ mean / (mean @ mean), 0, 1) * around
    area = float(covered.sum())
    if area < MIN_AREA:
        return None
    rows, columns = np.nonzero(component)
    height, width = component.shape
    center_y = float((covered.sum(axis=1) @ (np.arange(height) + 0.5)) / area)
    center_x = float((covered.sum(axis=0) @ (np.arange(width) + 0.5)) / area)
    overlaps = {shape: _overlap(shape, covered, center_x, center_y, area) for shape in SHAPES}
    shape = max(overlaps, key=overlaps.__getitem__)
    return Detection(
        shape=shape if overlaps[shape] >= MIN_OVERLAP else UNKNOWN,
        color=list(COLORS)[color],
        x=float(columns.min() + columns.max() + 1) / 2,
        y=float(rows.min() + rows.max() + 1) / 2,
        width=float(columns.max() - columns.min() + 1),
        height=float(rows.max() - rows.min() + 1),
        score=overlaps[shape],
    )


def _overlap(shape: str, covered: NDArray[np.float32], x: float, y: float, area: float) -> float:
    """Return intersection over union with the shape of the same area and centroid."""
    size = math.sqrt(area / _AREA[shape])
    template = coverage(shape, x, y - _CENTROID.get(shape, 0.0) * size, size, *covered.shape)
    return float(np.minimum(template, covered).sum() / np.maximum(template, covered).sum())


def matches_scene(detections: list[Detection], objects: list[tuple[str, str]]) -> bool:
    """Tell whether the detections are exactly the (shape, color) pairs of a scene."""
    return sorted((item.shape, item.color) for item in detections) == sorted(objects)
