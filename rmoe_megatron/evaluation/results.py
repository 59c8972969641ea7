"""What is left of an evaluation: results.json, a table beside it, and a gallery of judged images."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps
from scipy.stats import bootstrap

from rmoe_megatron.files import atomic
from rmoe_megatron.files.images import labelled_grid, open_picture, png, stacked

SIDE = 192  # pixels of an image in a gallery
BOX_COLORS = ("lime", "magenta", "cyan", "orange", "yellow", "red")  # of the classes in an image
RESAMPLES = 5000  # of a bootstrap: the standard error itself is off by one part in a hundred


@dataclass(frozen=True)
class Box:
    """Something that was found in an image, in its pixels."""

    name: str
    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Example:
    """An image of a gallery, under a heading, with what is said of it and what was found in it."""

    heading: str
    path: Path
    label: str
    boxes: tuple[Box, ...] = ()


def write_results(out: Path, results: dict[str, Any], table: str, examples: Sequence[Example]) -> None:
    """Write ``results.json``, ``results.md`` and ``gallery.png``, and print the table."""
    out.mkdir(parents=True, exist_ok=True)
    if examples:
        atomic.write(out / "gallery.png", png(gallery(examples)))
    atomic.write(out / "results.md", table)
    atomic.write(out / "results.json", json.dumps(results, indent=1) + "\n")
    print(table, end="")


def with_error(value: float, error: float | None, digits: int) -> str:
    """Return a score for a table, with its standard error where it is known."""
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def gallery(examples: Sequence[Example]) -> Image.Image:
    """Lay images out in grids, one under each heading."""
    grids = {}
    for heading in dict.fromkeys(example.heading for example in examples):
        chosen = [example for example in examples if example.heading == heading]
        images = np.stack([_thumbnail(example) for example in chosen])
        grids[heading] = labelled_grid(images, [example.label for example in chosen], columns=6)
    return stacked(grids)


def _thumbnail(example: Example) -> np.ndarray:
    """Return an image of a gallery's size with its boxes drawn in, uint8 [SIDE, SIDE, 3]."""
    with open_picture(example.path) as image:
        upright = ImageOps.exif_transpose(image)
        thumbnail = upright.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    draw, scale = ImageDraw.Draw(thumbnail), (SIDE / upright.width, SIDE / upright.height)
    names = list(dict.fromkeys(box.name for box in example.boxes))
    for box in example.boxes:
        color = BOX_COLORS[names.index(box.name) % len(BOX_COLORS)]
        left, right = (min(edge * scale[0], SIDE - 1) for edge in (box.left, box.right))
        top, bottom = (min(edge * scale[1], SIDE - 1) for edge in (box.top, box.bottom))
        draw.rectangle((left, top, right, bottom), outline=color, width=2)
        draw.text((left + 3, top + 1), box.name, fill=color)
    return np.asarray(thumbnail)


def prompt_key(number: int, prompt: str) -> str:
    """Return the name of a prompt in ``prompt_scores``: prompts of another set are never taken for it."""
    return f"{number:05d} {prompt}"


def standard_error(scores: Mapping[str, Mapping[str, float]]) -> float | None:
    """Return how far a score would move with other prompts: the standard error by bootstrap over prompts.

    Args:
        scores: the scores of every task's prompts; the score is the mean of the tasks' means. The prompts of a task are drawn anew, as
            many as there are.

    Returns:
        None where a task has a single prompt.
    """
    groups = [list(of_task.values()) for of_task in scores.values()]
    if min(map(len, groups), default=0) < 2:
        return None

    def mean_of_means(*tasks: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return np.mean([task.mean(axis=axis) for task in tasks], axis=0)

    return bootstrap_error([np.asarray(group, dtype=np.float64) for group in groups], mean_of_means)


def bootstrap_error(samples: Sequence[NDArray[Any]], statistic: Callable[..., NDArray[np.float64]]) -> float:
    """Return the standard error of a statistic: its deviation when every sample is drawn anew with replacement, each by itself.

    Args:
        samples: [n] each, of their own sizes.
        statistic: takes the samples, with any number of leading dimensions, and ``axis``, the one that is drawn along.
    """
    drawn = bootstrap(
        tuple(samples), statistic, n_resamples=RESAMPLES, batch=500, vectorized=True, method="percentile",
        rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(drawn.standard_error)
