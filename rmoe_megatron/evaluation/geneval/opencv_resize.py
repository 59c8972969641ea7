"""The bilinear resize of OpenCV for pictures of 8 bits, to the bit: mmdet's detectors see pictures that were resized by it.

OpenCV rounds the weights to whole numbers of 11 bits, and cuts bits off twice. A resize in floating point that is rounded at the end
gives other values in about every tenth pixel.
"""

import numpy as np
from numpy.typing import NDArray

ONE = 2048  # a weight of 1: 11 bits


def resize(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Return pixels uint8 [H, W, C] at another size, as ``cv2.resize`` with ``INTER_LINEAR`` does."""
    if pixels.shape[:2] == (height, width):
        return pixels
    columns, of_columns = _taps(pixels.shape[1], width)
    rows, of_rows = _taps(pixels.shape[0], height)
    # At the left and the right edge the whole weight goes to the last pixel; above and below, each half is rounded by itself.
    beyond = (columns < 0) | (columns >= pixels.shape[1] - 1)
    of_columns[1][beyond], of_columns[0][beyond] = 0, ONE
    wide = pixels.astype(np.int32)
    left, right = (wide[:, np.clip(columns + step, 0, pixels.shape[1] - 1)] for step in (0, 1))
    across = (left * of_columns[0][:, None] + right * of_columns[1][:, None]) >> 4
    above, below = (across[np.clip(rows + step, 0, pixels.shape[0] - 1)] for step in (0, 1))
    down = ((above * of_rows[0][:, None, None]) >> 16) + ((below * of_rows[1][:, None, None]) >> 16)
    return ((down + 2) >> 2).astype(np.uint8)


def _taps(size: int, new_size: int) -> tuple[NDArray[np.intp], tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Return for every new position the old one before it, which may be -1, and the weights of that one and of the next."""
    scale = 1.0 / (new_size / size)
    places = ((np.arange(new_size) + 0.5) * scale - 0.5).astype(np.float32)
    before = np.floor(places)
    share = places - before
    weights = tuple(np.rint(each * np.float32(ONE)).astype(np.int32) for each in (1 - share, share))
    return before.astype(np.intp), (weights[0], weights[1])
