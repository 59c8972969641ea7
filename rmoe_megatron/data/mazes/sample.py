"""Random grids: spanning-tree mazes for paths, scattered walls for regions."""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from rmoe_megatron.data.mazes.grid import Answer, Cell, Cells, layers_from, solve

MOST_TRIES = 20_000


class Task(StrEnum):
    """What a grid asks for."""

    path = "path"
    region = "region"


@dataclass(frozen=True)
class Request:
    """Which grids a split has.

    Attributes:
        sides: sides that the square of cells inside the canvas may have; odd ones for paths.
        steps: fewest and most steps of the search, both included.
        density: least and greatest share of walls that are drawn, for regions.
    """

    task: Task
    canvas: int
    sides: tuple[int, ...]
    steps: tuple[int, int]
    density: tuple[float, float] = (0.3, 0.5)


@dataclass(frozen=True)
class Maze:
    """A grid and what is known of it."""

    task: Task
    cells: Cells
    answer: Answer
    side: int
    density: float  # share of walls inside the square


def sample_maze(rng: np.random.Generator, request: Request) -> Maze:
    """Draw a grid of a request; it stands at a random place of the canvas, whose other cells are walls.

    Raises:
        ValueError: no grid of so many steps came up.
    """
    for _ in range(MOST_TRIES):
        side = int(rng.choice(request.sides))
        inside = (
            spanning_tree(rng, side) if request.task is Task.path else _scattered(rng, side, request.density)
        )
        if (inside == Cell.free).sum() < 2:
            continue
        _mark(rng, inside, request.task)
        answer = solve(inside)
        if request.steps[0] <= answer.steps <= request.steps[1]:
            return _placed(rng, request, inside)
    raise ValueError(
        f"no {request.task} of {request.steps[0]} to {request.steps[1]} steps came up on squares of side "
        f"{', '.join(map(str, request.sides))}"
    )


def _mark(rng: np.random.Generator, inside: Cells, task: Task) -> None:
    """Set the marks. Half of the last ones stand as far as possible from another free cell: searches are long more often."""
    free = np.argwhere(inside == Cell.free)
    first, last = free[rng.choice(len(free), size=2, replace=False)]
    if rng.integers(2):
        last = np.argwhere(layers_from(inside, (int(first[0]), int(first[1])))[-1])[0]
    if task is Task.path:
        inside[tuple(first)] = Cell.mark_a
    inside[tuple(last)] = Cell.mark_b if task is Task.path else Cell.mark_a


def spanning_tree(rng: np.random.Generator, side: int) -> Cells:
    """Return a maze without loops: rooms at even rows and columns, joined by a depth-first walk from a random room."""
    rooms = (side + 1) // 2
    cells = np.full((side, side), Cell.wall, dtype=np.uint8)
    stack = [(int(rng.integers(rooms)), int(rng.integers(rooms)))]
    cells[2 * stack[0][0], 2 * stack[0][1]] = Cell.free
    while stack:
        row, column = stack[-1]
        fresh = [(r, c) for r, c in _rooms_beside(row, column, rooms) if cells[2 * r, 2 * c] == Cell.wall]
        if not fresh:
            stack.pop()
            continue
        r, c = fresh[rng.integers(len(fresh))]
        cells[2 * r, 2 * c] = cells[row + r, column + c] = Cell.free
        stack.append((r, c))
    return cells


def _rooms_beside(row: int, column: int, rooms: int) -> list[tuple[int, int]]:
    places = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
    return [(r, c) for r, c in places if 0 <= r < rooms and 0 <= c < rooms]


def _scattered(rng: np.random.Generator, side: int, density: tuple[float, float]) -> Cells:
    walls = rng.random((side, side)) < rng.uniform(*density)
    return np.where(walls, Cell.wall, Cell.free).astype(np.uint8)


def _placed(rng: np.random.Generator, request: Request, inside: Cells) -> Maze:
    cells, side = np.full((request.canvas, request.canvas), Cell.wall, dtype=np.uint8), len(inside)
    row, column = rng.integers(request.canvas - side + 1, size=2)
    cells[row : row + side, column : column + side] = inside
    return Maze(request.task, cells, solve(cells), side, float((inside == Cell.wall).mean()))
