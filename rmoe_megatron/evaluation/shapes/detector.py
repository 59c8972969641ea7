"""Finds the objects of a toy shapes image without learned weights.

Foreground pixels differ from the background; a connected component is one object, or several that touch if their
cores fall apart by color or by the soft edge between them. An object's color is the nearest of the palette, its
shape the one whose rendering with the object's area and centroid overlaps it best.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from rmoe_megatron.data.shapes.render import coverage
from rmoe_megatron.data.shapes.vocabulary import BACKGROUND, COLORS, SHAPES

FOREGROUND_DISTANCE = 60.0  # RGB distance from the background, of 442 at most
MIN_AREA = 6.0  # pixels; the smallest object of the set covers 18
MAX_SIDE = 14  # pixels; the largest object of the set has 8, a box beyond this is a patch and no object
MIN_OVERLAP = 0.7  # intersection over union below which a component is no known shape
MIN_BRIGHTNESS = 0.4  # of the palette color's contrast to the background
MAX_OFF_HUE = (
    60.0  # RGB distance from the line background - palette color; the lines of two colors are 115 apart
)
CORE = 0.75  # of a color's contrast to the background; where two objects touch, edge pixels lie below
UNKNOWN = "unknown"

_BACKGROUND = np.asarray(BACKGROUND, dtype=np.float32)
_PALETTE = np.asarray(list(COLORS.values()), dtype=np.float32)
_DIRECTIONS = (_PALETTE - _BACKGROUND) / np.linalg.norm(_PALETTE - _BACKGROUND, axis=-1, keepdims=True)
_CONTRAST = np.linalg.norm(_PALETTE - _BACKGROUND, axis=-1)
_EIGHT_NEIGHBORS = np.ones((3, 3))
# Area of a shape over its box's, and distance of its centroid below the box's center over the box's side.
_AREA = {"circle": math.pi / 4, "square": 1.0, "triangle": 0.5, "cross": 5 / 9, "diamond": 0.5}
_CENTROID = {"triangle": 1 / 6}


@dataclass(frozen=True)
class Detection:
    """One object: shape and color (or "unknown"), box in pixels, and overlap with the shape from 0 to 1."""

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
    foreground = (difference**2).sum(axis=-1) > FOREGROUND_DISTANCE**2
    labels, count = ndimage.label(foreground, structure=_EIGHT_NEIGHBORS)
    found = []
    for number in range(1, count + 1):
        component = labels == number
        if component.sum() < MIN_AREA:
            continue
        item = _classify(difference, component, foreground)
        if item.shape == UNKNOWN:
            parts = [_classify(difference, part, foreground) for part in _split(difference, component)]
            known = [part for part in parts if part.shape != UNKNOWN]
            found += known or [item]
        else:
            found.append(item)
    return sorted(found, key=lambda item: -item.score)


def _split(difference: NDArray[np.float32], component: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Cut a component into the surroundings of its single-colored cores; nothing if it has only one."""
    along = difference @ _DIRECTIONS.T
    color = along.argmax(axis=-1)
    core = component & (along.max(axis=-1) >= CORE * _CONTRAST[color])
    markers = np.zeros(component.shape, dtype=np.int32)
    count = 0
    for index in np.unique(color[core]):
        labels, pieces = ndimage.label(core & (color == index))
        for piece in range(1, pieces + 1):
            if (labels == piece).sum() >= MIN_AREA:
                count += 1
                markers[labels == piece] = count
    if count < 2:
        return []
    rows, columns = ndimage.distance_transform_edt(markers == 0, return_distances=False, return_indices=True)
    nearest = markers[rows, columns]
    return [component & (nearest == number) for number in range(1, count + 1)]


def _classify(
    difference: NDArray[np.float32], component: NDArray[np.bool_], foreground: NDArray[np.bool_]
) -> Detection:
    distance = np.linalg.norm(difference, axis=-1)
    core = component & (distance >= 0.8 * np.percentile(distance[component], 90))
    mean = difference[core].mean(axis=0)
    # Edge pixels are a blend of object and background; the blend's weight is the share the object covers.
    around = ndimage.binary_dilation(component, structure=_EIGHT_NEIGHBORS) & (component | ~foreground)
    covered = np.clip(difference @ mean / (mean @ mean), 0, 1) * around
    area = float(covered.sum())
    rows, columns = np.nonzero(component)
    height, width = component.shape
    center_y = float((covered.sum(axis=1) @ (np.arange(height) + 0.5)) / area)
    center_x = float((covered.sum(axis=0) @ (np.arange(width) + 0.5)) / area)
    overlaps = {shape: _overlap(shape, covered, center_x, center_y, area) for shape in SHAPES}
    shape = max(overlaps, key=overlaps.__getitem__)
    box_width, box_height = int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1
    known = overlaps[shape] >= MIN_OVERLAP and max(box_width, box_height) <= MAX_SIDE
    return Detection(
        shape=shape if known else UNKNOWN,
        color=_color(mean),
        x=float(columns.min() + columns.max() + 1) / 2,
        y=float(rows.min() + rows.max() + 1) / 2,
        width=float(box_width),
        height=float(box_height),
        score=overlaps[shape],
    )


def _color(difference: NDArray[np.float32]) -> str:
    """Return the palette color nearest to the background plus ``difference`` [3], or "unknown"."""
    index = int(((difference + _BACKGROUND - _PALETTE) ** 2).sum(axis=-1).argmin())
    along = float(difference @ _DIRECTIONS[index])
    off = float(np.linalg.norm(difference - along * _DIRECTIONS[index]))
    return (
        list(COLORS)[index] if along >= MIN_BRIGHTNESS * _CONTRAST[index] and off <= MAX_OFF_HUE else UNKNOWN
    )


def _overlap(shape: str, covered: NDArray[np.float32], x: float, y: float, area: float) -> float:
    """Return intersection over union with the shape of the same area and centroid."""
    size = math.sqrt(area / _AREA[shape])
    template = coverage(shape, x, y - _CENTROID.get(shape, 0.0) * size, size, *covered.shape)
    return float(np.minimum(template, covered).sum() / np.maximum(template, covered).sum())


def matches_scene(detections: list[Detection], objects: list[tuple[str, str]]) -> bool:
    """Tell whether the detections are exactly the (shape, color) pairs of a scene."""
    return sorted((item.shape, item.color) for item in detections) == sorted(objects)
