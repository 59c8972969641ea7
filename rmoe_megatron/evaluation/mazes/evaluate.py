"""The mazes benchmark: pictures of the test grids with several numbers of sampling steps and depths, judged and summed up."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, with_config

from rmoe_megatron import durable
from rmoe_megatron.data.mazes.grid import Cells, from_text
from rmoe_megatron.data.shards import ShardDataset
from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.fingerprints import file_digest
from rmoe_megatron.evaluation.mazes.judge import is_right
from rmoe_megatron.evaluation.provenance import digest
from rmoe_megatron.evaluation.results import markdown_table
from rmoe_megatron.pictures import labelled_grid, png, stacked
from rmoe_megatron.typed_files import OPEN, read_json

SHOWN = 12  # pictures of the gallery, right and wrong ones each

# From texts, seeds, sampling steps and depth (None: as trained) to images uint8 [N, H, W, 3].
Generate = Callable[[list[str], list[int], int, int | None], NDArray[np.uint8]]


@with_config(OPEN)
class Description(TypedDict):
    """What is needed of ``dataset.json``."""

    name: str
    train_steps: int
    test_steps: list[int]


DESCRIPTION = TypeAdapter(Description)


@dataclass(frozen=True)
class Grid:
    """A test grid."""

    text: str
    cells: Cells
    steps: int
    side: int
    density: float


def read_set(data: Path, limit: int | None) -> tuple[Description, list[Grid]]:
    """Return what a set says of itself, and its test grids.

    Raises:
        UserError: it is no set of mazes, or a grid of it is none.
    """
    description = read_json(data / "dataset.json", DESCRIPTION)
    if description["name"] != "mazes" or not description["test_steps"]:
        raise UserError(f"{data} holds no mazes; make some with `rmoe data build-mazes`.")
    samples, grids = ShardDataset(data / "test", ["txt", "json"]), []
    for index in range(len(samples) if limit is None else min(limit, len(samples))):
        sample = samples[index]
        try:
            cells, about = from_text(sample["txt"]), sample["json"]
            grids.append(
                Grid(sample["txt"], cells, int(about["steps"]), int(about["side"]), float(about["density"]))
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"Grid {index} of {data / 'test'} cannot be read: {error}.") from error
    if not grids:
        raise UserError(f"{data / 'test'} holds no grids; build the set with --test.")
    return description, grids


def set_record(data: Path) -> dict[str, str]:
    """Return a digest of the shards of the test grids, as part of what an evaluation is of."""
    return {"test": digest([file_digest(shard) for shard in sorted((data / "test").glob("*.tar"))])}


def evaluate_mazes(
    generate: Generate,
    data: Path,
    out: Path,
    sampling: dict[str, Any],
    steps: Sequence[int],
    depths: Sequence[int | None],
    limit: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score a model and write ``results.json``, ``results.md`` and ``gallery.png`` to ``out``.

    Args:
        steps: numbers of sampling steps, each with all of ``depths``.
        sampling: how ``generate`` makes images; copied into the results.
        limit: grids; None takes all.

    Raises:
        UserError: the set cannot be read.
    """
    description, grids = read_set(data, limit)
    seeds = [int(np.random.SeedSequence([seed, index]).generate_state(1)[0]) for index in range(len(grids))]
    settings = [(count, depth) for count in steps for depth in depths]
    rows, pictures = [], np.zeros(0, dtype=np.uint8)
    for number, (count, depth) in enumerate(settings):
        if progress is not None:
            progress(number, len(settings))
        pictures = generate([grid.text for grid in grids], seeds, count, depth)
        right = [is_right(pictures[index], grid.cells) for index, grid in enumerate(grids)]
        rows.append({"sampling_steps": count, "depth": depth, **score(description, grids, right)})
    if progress is not None:
        progress(len(settings), len(settings))
    results = {
        "benchmark": "mazes",
        **sampling,
        "seed": seed,
        "grids": len(grids),
        "train_steps": description["train_steps"],
        "rows": rows,
    }
    _write(out, results, grids, pictures, rows[-1]["right"])
    return results


def score(description: Description, grids: Sequence[Grid], right: Sequence[bool]) -> dict[str, Any]:
    """Return the shares of right pictures: of all, by steps of the search, by side and by density, and each picture's verdict."""
    ends = description["test_steps"]
    starts = [1, *(end + 1 for end in ends[:-1])]
    by_steps = {
        f"{first}-{last}": [first <= grid.steps <= last for grid in grids]
        for first, last in zip(starts, ends, strict=True)
    }
    by_steps["longer than trained"] = [grid.steps > description["train_steps"] for grid in grids]
    middle = float(np.median([grid.density for grid in grids]))
    sides = sorted({grid.side for grid in grids})
    return {
        "exact": float(np.mean(right)),
        "by_steps": _shares(by_steps, right),
        "by_side": _shares({str(side): [grid.side == side for grid in grids] for side in sides}, right),
        "by_density": _shares(
            {
                f"up to {middle:.2f}": [grid.density <= middle for grid in grids],
                f"above {middle:.2f}": [grid.density > middle for grid in grids],
            },
            right,
        ),
        "right": [int(value) for value in right],
    }


def _shares(groups: dict[str, list[bool]], right: Sequence[bool]) -> dict[str, dict[str, float]]:
    """Return share and number of pictures of every group that has some."""
    return {
        name: {"exact": float(np.mean(np.array(right)[chosen])), "grids": int(np.sum(chosen))}
        for name, chosen in groups.items()
        if any(chosen)
    }


def table(results: dict[str, Any]) -> str:
    """Return the shares by steps of the search, a row for each number of sampling steps and depth."""
    names = list(dict.fromkeys(name for row in results["rows"] for name in row["by_steps"]))
    header = [
        "mazes (toy), exact match",
        "all",
        *(f"{name} steps" if name[0].isdigit() else name for name in names),
    ]
    rows = [
        [
            f"{row['sampling_steps']} sampling steps, depth {row['depth'] if row['depth'] is not None else 'as trained'}",
            f"{row['exact']:.3f}",
            *(f"{row['by_steps'][name]['exact']:.3f}" if name in row["by_steps"] else "-" for name in names),
        ]
        for row in results["rows"]
    ]
    return markdown_table(header, rows)


def _write(
    out: Path,
    results: dict[str, Any],
    grids: Sequence[Grid],
    pictures: NDArray[np.uint8],
    right: Sequence[int],
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    galleries = {}
    for verdict, title in ((1, "right"), (0, "wrong")):
        chosen = [index for index, value in enumerate(right) if value == verdict][:SHOWN]
        if chosen:
            labels = [f"{grids[index].steps} steps, side {grids[index].side}" for index in chosen]
            galleries[title] = labelled_grid(pictures[chosen], labels, columns=6)
    durable.write(out / "gallery.png", png(stacked(galleries)))
    text = table(results)
    durable.write(out / "results.md", text)
    durable.write(out / "results.json", json.dumps(results) + "\n")
    print(text, end="")
