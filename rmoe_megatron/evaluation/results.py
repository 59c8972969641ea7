"""What is left of an evaluation: results.json, a table beside it, and a gallery of judged images."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rmoe_megatron import durable
from rmoe_megatron.pictures import labelled_grid, open_picture, png, stacked

SIDE = 192  # pixels of an image in a gallery


@dataclass(frozen=True)
class Example:
    """An image of a gallery, under a heading, with what is said of it."""

    heading: str
    path: Path
    label: str


def write_results(out: Path, results: dict[str, Any], table: str, examples: Sequence[Example]) -> None:
    """Write ``results.json``, ``results.md`` and ``gallery.png``, and print the table."""
    out.mkdir(parents=True, exist_ok=True)
    if examples:
        durable.write(out / "gallery.png", png(gallery(examples)))
    durable.write(out / "results.md", table)
    durable.write(out / "results.json", json.dumps(results, indent=1) + "\n")
    print(table, end="")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def gallery(examples: Sequence[Example]) -> Image.Image:
    """Lay images out in grids, one under each heading."""
    grids = {}
    for heading in dict.fromkeys(example.heading for example in examples):
        chosen = [example for example in examples if example.heading == heading]
        images = np.stack([_thumbnail(example.path) for example in chosen])
        grids[heading] = labelled_grid(images, [example.label for example in chosen], columns=6)
    return stacked(grids)


def _thumbnail(path: Path) -> np.ndarray:
    with open_picture(path) as image:
        return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
