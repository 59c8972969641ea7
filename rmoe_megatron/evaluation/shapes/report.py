"""What is left of an evaluation: results.json, a table, and a picture of right and wrong images."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rmoe_megatron.evaluation.shapes.rules import Verdict
from rmoe_megatron.files import atomic
from rmoe_megatron.files.images import labelled_grid, png, stacked

PER_SKILL = 3  # right and wrong examples each


@dataclass(frozen=True)
class JudgedImage:
    """One generated image and its verdict."""

    split: str
    skill: str
    caption: str
    image: NDArray[np.uint8]
    verdict: Verdict


def write_report(results: dict[str, Any], judged: Sequence[JudgedImage], out: Path) -> None:
    """Write the results to ``out`` and print the table."""
    out.mkdir(parents=True, exist_ok=True)
    picture = examples(judged)
    atomic.write(out / "examples.png", png(picture))
    text = table(results)
    atomic.write(out / "results.md", text)
    atomic.write(out / "results.json", json.dumps(results, indent=1) + "\n")
    print(text, end="")


def table(results: dict[str, Any]) -> str:
    """Return the scores as a Markdown table, one row per split."""
    splits = results["splits"]
    skills = list(dict.fromkeys(skill for split in splits.values() for skill in split["skills"]))
    header = ["toy shapes", "overall", *skills, "images"]
    rows = [
        [name, _with_error(split["overall"], split["standard_error"])]
        + [f"{split['skills'][skill]:.3f}" if skill in split["skills"] else "-" for skill in skills]
        + [str(split["images"])]
        for name, split in splits.items()
    ]
    lines = [header, ["---"] * len(header), *rows]
    accuracy = results["detector_accuracy_on_ground_truth"]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + (
        f"\n\nDetector accuracy on the ground-truth images: {accuracy:.4f}\n"
    )


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def examples(judged: Sequence[JudgedImage]) -> Image.Image:
    """Return right images above wrong ones, a few of every skill, with caption and verdict."""
    chosen: dict[tuple[bool, str], list[JudgedImage]] = defaultdict(list)
    for item in judged:
        group = chosen[(item.verdict.correct, item.skill)]
        if len(group) < PER_SKILL and item.caption not in [other.caption for other in group]:
            group.append(item)
    grids = {}
    for correct, title in ((True, "right"), (False, "wrong")):
        items = [
            item for (verdict, _), group in sorted(chosen.items()) if verdict == correct for item in group
        ]
        if items:
            labels = [f"{item.caption}: {item.verdict.reason or 'right'}" for item in items]
            grids[title] = labelled_grid(np.stack([item.image for item in items]), labels, columns=6)
    return stacked(grids)
