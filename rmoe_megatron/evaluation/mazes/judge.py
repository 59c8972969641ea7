"""Reads a picture of a maze cell by cell, and compares it with the grid's answer."""

import numpy as np
from numpy.typing import NDArray

from rmoe_megatron.data.mazes.grid import PALETTE, Cell, Cells, solve


def decode(image: NDArray[np.uint8], canvas: int) -> Cells:
    """Return what each cell of a picture uint8 [H, W, 3] shows, uint8 [N, N] of Cell: the palette's nearest colour to its mean.

    Raises:
        ValueError: the sides are no multiples of the canvas.
    """
    height, width, _ = image.shape
    if height % canvas or width % canvas:
        raise ValueError(f"a picture of {width} x {height} pixels has no {canvas} x {canvas} cells")
    cells = image.reshape(canvas, height // canvas, canvas, width // canvas, 3).mean(axis=(1, 3))
    distances = np.square(cells[:, :, None] - PALETTE.astype(np.float64)).sum(axis=-1)
    return distances.argmin(axis=-1).astype(np.uint8)


def expected_cells(cells: Cells) -> Cells:
    """Return what the picture of a grid has to show."""
    return np.where(solve(cells).cells & (cells == Cell.free), np.uint8(Cell.answer), cells)


def is_right(image: NDArray[np.uint8], cells: Cells) -> bool:
    """Return whether a picture shows the grid with its answer and nothing else, in every cell."""
    return bool((decode(image, len(cells)) == expected_cells(cells)).all())
