"""The mazes benchmark: pictures of the test grids with several numbers of sampling steps and depths, made by all ranks, summed up."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, with_config

from rmoe_megatron.data.mazes.grid import Cells, from_text
from rmoe_megatron.data.shards.dataset import ShardDataset
from rmoe_megatron.distributed.launch import rank
from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.mazes.judge import is_right
from rmoe_megatron.evaluation.results import markdown_table, prompt_key, standard_error, with_error
from rmoe_megatron.evaluation.workspace import check_out, products_of
from rmoe_megatron.files import atomic
from rmoe_megatron.files.images import labelled_grid, open_picture, png, stacked
from rmoe_megatron.files.untrusted import OPEN, read_json
from rmoe_megatron.inference.fingerprints import file_digest
from rmoe_megatron.inference.generation import (
    ImageRequest,
    Part,
    Picture,
    Progress,
    Sampling,
    filled_by_the_job,
    generate,
    image_product,
    sampling_record,
    seed_of,
)
from rmoe_megatron.inference.provenance import Record, digest
from rmoe_megatron.versions import versions_of

SHOWN = 12  # pictures of the gallery, right and wrong ones each


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
        UserError: it is no set of mazes, or one of its grids is malformed.
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


@dataclass(frozen=True)
class Settings:
    """What is scored: all of ``steps`` (of the sampler) with all of ``depths``, of which None is as trained.

    ``limit`` is grids; None takes all.
    """

    data: Path
    out: Path
    steps: tuple[int, ...]
    depths: tuple[int | None, ...] = (None,)
    limit: int | None = None
    again: bool = False  # make anew what was made by another command, which is refused otherwise


def evaluate_mazes(sampling: Sampling, settings: Settings, progress: Progress | None = None) -> None:
    """Make the pictures of every setting, judge them, and write ``results.json``, ``results.md`` and ``gallery.png``.

    Every rank takes part in making the pictures, and what is there is not made again; rank 0 judges them.

    Args:
        sampling: its steps and depth give way to those of the settings.
        progress: called with (pictures done, pictures in total).

    Raises:
        UserError: the set cannot be read, or ``out`` holds another evaluation.
    """
    description, grids = read_set(settings.data, settings.limit)
    ways = [
        replace(sampling, steps=steps, depth=depth) for steps in settings.steps for depth in settings.depths
    ]
    identity: Record = {
        "benchmark": "mazes",
        "prompt_set": set_record(settings.data) | {"limit": settings.limit},
        "sampling": sampling_record(sampling)
        | {"steps": list(settings.steps), "depth": list(settings.depths)},
        "judge": {"decoder": "nearest colour of every cell", "versions": versions_of("numpy")},
    }
    parts = [picture_part(way, grids, settings.out / "images") for way in ways]
    products = [product for _, pictures in parts for product in products_of(pictures)]
    with filled_by_the_job(settings.out):
        check_out(settings.out, products, identity, settings.again)
        generate(parts, settings.out / ".claims", progress)
        if rank() == 0:
            pictures = [load_pictures(some) for _, some in parts]
            judged = [judge(some, grids) for some in pictures]
            results = identity | {
                "model": str(Path(sampling.model).absolute()),
                "seed": sampling.seed,
                "grids": len(grids),
                "train_steps": description["train_steps"],
                "rows": [
                    {"sampling_steps": way.steps, "depth": way.depth, **score(description, grids, right)}
                    for way, right in zip(ways, judged, strict=True)
                ],
            }
            _write(settings.out, results, grids, pictures[-1], results["rows"][-1]["right"])


def picture_part(way: Sampling, grids: Sequence[Grid], folder: Path) -> Part:
    """Return the pictures of all grids in one way of sampling; a grid's noise is the same in each."""
    record, name = sampling_record(way), f"steps-{way.steps}"
    name += f"-depth-{way.depth}" if way.depth is not None else ""
    requests = [
        ImageRequest(grid.text, number, 0, folder / name / f"{number:05d}.png", seed_of(way.seed, number))
        for number, grid in enumerate(grids)
    ]
    return way, [Picture(request, image_product(request, record)) for request in requests]


def load_pictures(pictures: Sequence[Picture]) -> NDArray[np.uint8]:
    """Return pictures that are there as uint8 [N, H, W, 3]."""
    loaded = []
    for picture in pictures:
        with open_picture(picture.request.path) as file:
            loaded.append(np.asarray(file.convert("RGB")))
    return np.stack(loaded)


def judge(pictures: NDArray[np.uint8], grids: Sequence[Grid]) -> list[bool]:
    """Return whether each picture of [N, H, W, 3] shows the solution of its grid."""
    return [is_right(picture, grid.cells) for picture, grid in zip(pictures, grids, strict=True)]


def score(description: Description, grids: Sequence[Grid], right: Sequence[bool]) -> dict[str, Any]:
    """Return the shares of right pictures: of all with its standard error, by steps of the search, by side and by density.

    ``right`` is the verdict of each picture.
    """
    ends = description["test_steps"]
    starts = [1, *(end + 1 for end in ends[:-1])]
    by_steps = {
        f"{first}-{last}": [first <= grid.steps <= last for grid in grids]
        for first, last in zip(starts, ends, strict=True)
    }
    by_steps["longer than trained"] = [grid.steps > description["train_steps"] for grid in grids]
    middle = float(np.median([grid.density for grid in grids]))
    sides = sorted({grid.side for grid in grids})
    verdicts = {
        prompt_key(number, grid.text): float(each)
        for number, (grid, each) in enumerate(zip(grids, right, strict=True))
    }
    return {
        "exact": float(np.mean(right)),
        "standard_error": standard_error({"grids": verdicts}),
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
            with_error(row["exact"], row["standard_error"], digits=3),
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
    atomic.write(out / "gallery.png", png(stacked(galleries)))
    text = table(results)
    atomic.write(out / "results.md", text)
    atomic.write(out / "results.json", json.dumps(results) + "\n")
    print(text, end="")
