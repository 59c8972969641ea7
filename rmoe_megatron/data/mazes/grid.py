"""Grids of walls with marks, their answers, and both as text and as pictures.

A grid is a canvas of N x N cells, each a wall, free, or one of two marks. With two marks the task is the *path*: the cells of the
shortest way from A to B. With A alone it is the *region*: the cells that A reaches in steps to the four neighbours. The text has a
character for each cell, row by row, with ``/`` between rows; the picture has a square of one colour for each cell.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

CELL_PIXELS = 4  # side of a cell in the picture
CHARACTERS = "#.AB"  # wall, free, marks
ROW_END = "/"

Cells = NDArray[np.uint8]  # [N, N] of Cell
Mask = NDArray[np.bool_]  # [N, N]


class Cell(IntEnum):
    """What a cell is in a condition and in a picture; ``answer`` is in pictures only."""

    wall = 0
    free = 1
    mark_a = 2
    mark_b = 3
    answer = 4


# By Cell. The toy sets' pixel codec brings these values to -1.1, 0.1 and 1.4.
PALETTE = np.array([(0, 0, 0), (64, 64, 64), (0, 128, 0), (128, 0, 0), (128, 128, 0)], dtype=np.uint8)


@dataclass(frozen=True)
class Answer:
    """What a grid asks for: the cells, marks included, and the number of steps of the search that finds them."""

    cells: Mask
    steps: int


def to_text(cells: Cells) -> str:
    """Return the grid as text, ``#`` for a wall, ``.`` for a free cell, ``A`` and ``B`` for marks."""
    return ROW_END.join("".join(CHARACTERS[cell] for cell in row) for row in cells)


def from_text(text: str) -> Cells:
    """Return the grid of a text.

    Raises:
        ValueError: it is no square of known characters, or has not one A and at most one B.
    """
    rows = text.split(ROW_END)
    if any(len(row) != len(rows) for row in rows) or not set(text) <= set(CHARACTERS + ROW_END):
        raise ValueError(f"{text!r:.40} is no square of {CHARACTERS}")
    if text.count("A") != 1 or text.count("B") > 1:
        raise ValueError(f"{text!r:.40} has not one A and at most one B")
    return np.array([[CHARACTERS.index(character) for character in row] for row in rows], dtype=np.uint8)


def layers_from(cells: Cells, start: tuple[int, int]) -> list[Mask]:
    """Return the cells that are 0, 1, 2, ... steps from ``start``, until no cell is new."""
    open_cells, begin = _as_bits(cells != Cell.wall), np.zeros(cells.shape, dtype=np.bool_)
    begin[start] = True
    # A row has one bit more than cells, which is never set: steps to the left and right do not change the row.
    frontier, row = _as_bits(begin), len(cells) + 1
    seen, layers = frontier, []
    while frontier:
        layers.append(frontier)
        beside = frontier << 1 | frontier >> 1 | frontier << row | frontier >> row
        frontier = beside & open_cells & ~seen
        seen |= frontier
    return [_as_mask(layer, len(cells)) for layer in layers]


def _as_bits(mask: Mask) -> int:
    packed = np.packbits(np.pad(mask, ((0, 0), (0, 1))), bitorder="little")
    return int.from_bytes(packed.tobytes(), "little")


def _as_mask(bits: int, side: int) -> Mask:
    count = side * (side + 1)
    packed = np.frombuffer(bits.to_bytes(-(-count // 8), "little"), dtype=np.uint8)
    return (
        np.unpackbits(packed, count=count, bitorder="little").reshape(side, side + 1)[:, :-1].astype(np.bool_)
    )


def solve(cells: Cells) -> Answer:
    """Return the path from A to B, or without B the region that A reaches.

    Raises:
        ValueError: A does not reach B, or does so on several shortest ways.
    """
    from_a = layers_from(cells, place_of(cells, Cell.mark_a))
    if not (cells == Cell.mark_b).any():
        return Answer(np.logical_or.reduce(from_a), len(from_a) - 1)
    from_b = layers_from(cells, place_of(cells, Cell.mark_b))
    end = place_of(cells, Cell.mark_b)
    length = next((steps for steps, layer in enumerate(from_a) if layer[end]), None)
    if length is None:
        raise ValueError("A does not reach B")
    path = np.logical_or.reduce([from_a[steps] & from_b[length - steps] for steps in range(length + 1)])
    if path.sum() != length + 1:
        raise ValueError("there are several shortest ways from A to B")
    return Answer(path, length)


def place_of(cells: Cells, cell: Cell) -> tuple[int, int]:
    """Return row and column of a mark."""
    row, column = np.argwhere(cells == cell)[0]
    return int(row), int(column)


def draw(cells: Cells, answer: Mask) -> NDArray[np.uint8]:
    """Return the picture of a grid with its answer, uint8 [4 N, 4 N, 3]; marks stay visible."""
    shown = np.where(answer & (cells == Cell.free), np.uint8(Cell.answer), cells)
    return PALETTE[shown].repeat(CELL_PIXELS, axis=0).repeat(CELL_PIXELS, axis=1)
