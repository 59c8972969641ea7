"""GenEval 2 from prompts to scores: one image a prompt, asked by all ranks, summed up by rank 0."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ImageOps
from pydantic import TypeAdapter

from rmoe_megatron.evaluation.generation import (
    ImageRequest,
    Progress,
    Sampling,
    fill,
    make_or_require,
)
from rmoe_megatron.evaluation.geneval2.prompts import Prompt, is_official
from rmoe_megatron.evaluation.geneval2.soft_tifa import (
    QUIRKS,
    geometric_mean,
    score_atom,
    summarise,
)
from rmoe_megatron.evaluation.protocol import Protocol
from rmoe_megatron.evaluation.question_answering import QWEN3_VL, Qwen3VL
from rmoe_megatron.evaluation.results import Example, markdown_table, write_results
from rmoe_megatron.launch import rank
from rmoe_megatron.pictures import open_picture
from rmoe_megatron.typed_files import read_json

SCORES = TypeAdapter(list[float])
EXAMPLES = 6  # best and worst


@dataclass(frozen=True)
class Settings:
    """What is asked by which model and rules."""

    out: Path
    protocol: Protocol = Protocol.official
    answerer: str = QWEN3_VL


def evaluate_geneval2(
    prompts: list[Prompt], sampling: Sampling, settings: Settings, progress: Callable[[str], Progress | None]
) -> None:
    """Make the images (``00000.png``), unless the model is a folder of them, ask the questions and write the results.

    Every rank takes part. What is there is not done again.

    Args:
        progress: makes a progress bar with a title.

    Raises:
        UserError: images are missing, or a model cannot be had.
    """

    def requests(folder: Path) -> list[ImageRequest]:
        return [
            ImageRequest(prompt["prompt"], number, 0, folder / f"{number:05d}.png")
            for number, prompt in enumerate(prompts)
        ]

    images = make_or_require(requests, sampling, settings.out, progress("sample"))
    scores = ask_all(prompts, images, settings, progress("ask"))
    if rank() == 0:
        results = {
            "benchmark": "GenEval 2",
            "protocol": settings.protocol.value,
            "quirks": QUIRKS if settings.protocol is Protocol.official else [],
            "differences": [
                *(
                    []
                    if settings.answerer == QWEN3_VL
                    else [f"asked of {settings.answerer}, not of {QWEN3_VL}"]
                ),
                *([] if is_official(prompts) else ["not the published 800 prompts"]),
            ],
            "sampling": sampling.described(),
            **summarise(scores, prompts),
            "prompts": len(prompts),
            "atoms": sum(len(atoms) for atoms in scores),
        }
        write_results(settings.out, results, table(results), _examples(scores, prompts, images))


def ask_all(
    prompts: list[Prompt], images: list[ImageRequest], settings: Settings, progress: Progress | None
) -> list[list[float]]:
    """Score the atoms of every image that is not scored yet; returns all scores, of all ranks."""
    files = [
        settings.out / "scores" / f"{number:05d}.{settings.protocol.value}.json"
        for number in range(len(prompts))
    ]
    answerer = functools.cache(lambda: Qwen3VL(settings.answerer))

    def scores(number: int) -> bytes:
        with open_picture(images[number].path) as file:
            image = ImageOps.exif_transpose(file)
            atoms = [
                score_atom(answerer(), image, question, answer, settings.protocol)
                for question, answer in prompts[number]["vqa_list"]
            ]
        return json.dumps(atoms).encode()

    fill(files, settings.out / "claims" / "scores", scores, progress)
    return [read_json(file, SCORES) for file in files]


def table(results: dict[str, Any]) -> str:
    """Return the scores as Markdown tables, with what they differ in from published ones."""
    skills, atomicities = results["skills_am"], results["atomicities_gm"]
    header = ["GenEval 2", "AM", "GM", *skills, *(f"{count} atoms" for count in atomicities)]
    numbers = [results["soft_tifa_am"], results["soft_tifa_gm"], *skills.values(), *atomicities.values()]
    notes = "".join(f"- {note}\n" for note in results["differences"])
    return f"{markdown_table(header, [[results['protocol'], *(f'{number:.2f}' for number in numbers)]])}\n{notes}"


def _examples(scores: list[list[float]], prompts: list[Prompt], images: list[ImageRequest]) -> list[Example]:
    order = sorted(range(len(prompts)), key=lambda number: -geometric_mean(scores[number]))
    chosen = {"best": order[:EXAMPLES], "worst": order[EXAMPLES:][-EXAMPLES:]}
    return [
        Example(
            heading, images[number].path, f"{geometric_mean(scores[number]):.2f} {prompts[number]['prompt']}"
        )
        for heading, numbers in chosen.items()
        for number in numbers
    ]
