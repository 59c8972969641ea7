"""Writes mazes as WebDataset tar shards, with the text encoder that reads them.

Layout: ``OUT/{train,val,test}/mazes-NNNNNN.tar`` with members KEY.png (the grid with its answer), KEY.txt (the grid as text) and
KEY.json (task, side, steps, density), ``OUT/encoder/`` and ``OUT/dataset.json``. A sample is a function of (seed, split, index)
alone. Training and ``val`` have short searches on small squares; ``test`` has as many grids of every range of steps, also of longer
searches than training, on squares that may be larger.
"""

import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rmoe_megatron.data.mazes.grid import draw, to_text
from rmoe_megatron.data.mazes.sample import Maze, Request, Task, sample_maze
from rmoe_megatron.data.shards.writer import open_shard
from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic

SAMPLES_PER_SHARD = 1000
SPLITS = ("train", "val", "test")  # the position enters the random seed
MOST_CANVAS = 64


@dataclass(frozen=True)
class MazeSettings:
    """What a set of mazes is.

    Attributes:
        canvas: cells of a side of the pictures.
        train_sides: of the squares that grids of training and ``val`` fill, ``test_sides`` of those of ``test``.
        train_steps: most steps of a search in training and ``val``.
        test_steps: ends of the ranges of steps in ``test``, both included; the first begins at 1.
    """

    task: Task = Task.region
    canvas: int = 8
    train_sides: tuple[int, ...] = (5, 6)
    train_steps: int = 8
    test_sides: tuple[int, ...] = (6, 7, 8)
    test_steps: tuple[int, ...] = (4, 8, 12, 16, 20)

    def ranges(self) -> list[tuple[int, int]]:
        """Return the ranges of steps in ``test``."""
        starts = [1, *(end + 1 for end in self.test_steps[:-1])]
        return list(zip(starts, self.test_steps, strict=True))

    def request(self, split: str, index: int) -> Request:
        """Return what sample ``index`` of a split is drawn from; the ranges of ``test`` take turns."""
        if split == "test":
            ranges = self.ranges()
            return Request(self.task, self.canvas, self.test_sides, ranges[index % len(ranges)])
        return Request(self.task, self.canvas, self.train_sides, (1, self.train_steps))


def build_mazes(
    out: Path,
    settings: MazeSettings,
    counts: dict[str, int],
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a set of mazes; the folder appears whole or not at all.

    Args:
        out: folder to create; it may exist if it is empty.
        counts: samples of each split.
        progress: called with (samples written, samples in total) now and then.

    Returns:
        The content of ``dataset.json``.

    Raises:
        UserError: a setting is out of range, no grid of a range of steps comes up, or ``out`` is not empty or cannot be written.
    """
    from rmoe_megatron.data.mazes.encoder import write_encoder  # imports transformers

    _check(settings, counts)
    atomic.require_empty(out, "The output")
    done, total = 0, sum(counts.values())
    description: dict[str, Any] = {
        "name": "mazes", "toy": True, "seed": seed, **json.loads(json.dumps(asdict(settings))), "samples": counts,
    }  # fmt: skip
    with atomic.building(out) as partial:
        for split in SPLITS:
            (partial / split).mkdir()
            for start in range(0, counts[split], SAMPLES_PER_SHARD):
                indices = range(start, min(start + SAMPLES_PER_SHARD, counts[split]))
                path = partial / split / f"mazes-{start // SAMPLES_PER_SHARD:06d}.tar"
                _write_shard(path, settings, seed, split, indices)
                done += len(indices)
                if progress is not None:
                    progress(done, total)
        write_encoder(partial / "encoder", settings.canvas)
        (partial / "dataset.json").write_text(json.dumps(description, indent=1) + "\n")
    return description


def make_maze(settings: MazeSettings, seed: int, split: str, index: int) -> Maze:
    """Return sample ``index`` of a split.

    Raises:
        UserError: no grid of so many steps comes up.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    try:
        return sample_maze(rng, settings.request(split, index))
    except ValueError as error:
        raise UserError(
            f"The split {split} cannot be drawn: {error}; ask for fewer steps or larger sides."
        ) from error


def _check(settings: MazeSettings, counts: dict[str, int]) -> None:
    sides = settings.train_sides + settings.test_sides
    if not 2 <= settings.canvas <= MOST_CANVAS or not all(2 <= side <= settings.canvas for side in sides):
        raise UserError(
            f"The canvas ({settings.canvas}) must have 2 to {MOST_CANVAS} cells a side, and the sides {sorted(set(sides))} 2 to as many."
        )
    if settings.task is Task.path and any(side % 2 == 0 for side in sides):
        raise UserError(f"Mazes have rooms at every second cell: the sides {sorted(set(sides))} must be odd.")
    ends = settings.test_steps
    if settings.train_steps < 1 or not ends or ends[0] < 1 or list(ends) != sorted(set(ends)):
        raise UserError(
            f"Steps are 1 or more and the ends of their ranges grow; train_steps is {settings.train_steps}, test_steps {list(ends)}."
        )
    if counts["train"] < 1 or min(counts.values()) < 0:
        raise UserError(f"A set needs a training sample or more, and no negative number of them: {counts}.")


def _write_shard(path: Path, settings: MazeSettings, seed: int, split: str, indices: range) -> None:
    with open_shard(path) as write:
        for index in indices:
            maze = make_maze(settings, seed, split, index)
            png = io.BytesIO()
            Image.fromarray(draw(maze.cells, maze.answer.cells)).save(png, format="png")
            about = {
                "task": maze.task.value, "side": maze.side, "steps": maze.answer.steps, "density": round(maze.density, 4),
            }  # fmt: skip
            write(f"{split}-{index:08d}", {"png": png.getvalue(), "txt": to_text(maze.cells), "json": about})
