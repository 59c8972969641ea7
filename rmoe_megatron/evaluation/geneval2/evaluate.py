"""GenEval 2 from prompts to scores: one image a prompt, asked by all ranks, summed up by rank 0."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageOps
from pydantic import TypeAdapter

from rmoe_megatron.evaluation.fingerprints import model_digest
from rmoe_megatron.evaluation.generation import (
    ImageRequest,
    Picture,
    Progress,
    Sampling,
    check_out,
    fill,
    generate,
    plan,
    products_of,
)
from rmoe_megatron.evaluation.geneval2.prompts import Prompt, is_official
from rmoe_megatron.evaluation.geneval2.soft_tifa import (
    QUIRKS,
    geometric_mean,
    score_atom,
    summarise,
)
from rmoe_megatron.evaluation.protocol import Protocol
from rmoe_megatron.evaluation.provenance import Product, Record, digest
from rmoe_megatron.evaluation.question_answering import QWEN3_VL, Qwen3VL
from rmoe_megatron.evaluation.results import (
    Example,
    markdown_table,
    prompt_key,
    standard_error,
    with_error,
    write_results,
)
from rmoe_megatron.launch import local_rank, rank
from rmoe_megatron.pictures import open_picture
from rmoe_megatron.platform import inference_device
from rmoe_megatron.pretrained.hub import is_of_the_hub, model_folder
from rmoe_megatron.pretrained.model_files import judge_parts
from rmoe_megatron.typed_files import read_json
from rmoe_megatron.versions import INFERENCE, versions_of

SCORES = TypeAdapter(list[float])
EXAMPLES = 6  # best and worst


@dataclass(frozen=True)
class Settings:
    """What is asked by which model and rules."""

    out: Path
    protocol: Protocol = Protocol.official
    answerer: str = QWEN3_VL
    again: bool = False  # make anew what was made by another command, which is refused otherwise


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

    pictures, made = plan(requests, sampling, settings.out)
    answerer_made_of = {
        "answerer_sha256": model_digest(model_folder(settings.answerer, judge_parts)),
        "device": inference_device(local_rank()).type,
        "versions": versions_of(*INFERENCE),
    }
    identity: Record = {
        "benchmark": "GenEval 2",
        "protocol": settings.protocol.value,
        "prompt_set": {"number": len(prompts), "sha256": digest(prompts)},
        "sampling": made,
        "judge": answerer_made_of,
    }
    products = score_products(prompts, pictures, settings, answerer_made_of)
    check_out(settings.out, [*products_of(pictures), *products], identity, settings.again)
    generate(pictures, sampling, settings.out / "claims" / "images", progress("sample"))
    images = [picture.request for picture in pictures]
    scores = ask_all(prompts, images, products, settings, progress("ask"))
    if rank() == 0:
        results = identity | {
            "model": str(Path(sampling.model).absolute()),
            "answerer": settings.answerer,
            "quirks": QUIRKS if settings.protocol is Protocol.official else [],
            "differences": [
                *(
                    []
                    if is_of_the_hub(settings.answerer, QWEN3_VL)
                    else [f"asked of {settings.answerer}, not of {QWEN3_VL}"]
                ),
                *([] if is_official(prompts) else ["not the published 800 prompts"]),
            ],
            **summarise(scores, prompts),
            "standard_error": standard_error(score_prompts(scores, prompts, geometric_mean)),
            "standard_error_am": standard_error(score_prompts(scores, prompts, np.mean)),
            "prompts": len(prompts),
            "atoms": sum(len(atoms) for atoms in scores),
            "prompt_scores": score_prompts(scores, prompts, geometric_mean),
        }
        write_results(settings.out, results, table(results), _examples(scores, prompts, images))


def score_products(
    prompts: list[Prompt], pictures: list[Picture], settings: Settings, answerer_made_of: Record
) -> list[Product]:
    """Return the file of the scores of every prompt's atoms."""

    def record(number: int) -> Record:
        return {
            "asked": digest(prompts[number]),
            "pictures": [pictures[number].identity],
            "protocol": settings.protocol.value,
            "judge": answerer_made_of,
        }

    return [
        Product(
            settings.out / "scores" / f"{number:05d}.{settings.protocol.value}.json",
            functools.partial(record, number),
        )
        for number in range(len(prompts))
    ]


def ask_all(
    prompts: list[Prompt],
    images: list[ImageRequest],
    products: list[Product],
    settings: Settings,
    progress: Progress | None,
) -> list[list[float]]:
    """Score the atoms of every image that is not scored yet; returns all scores, of all ranks."""
    answerer = functools.cache(lambda: Qwen3VL(settings.answerer))

    def scores(number: int) -> bytes:
        with open_picture(images[number].path) as file:
            image = ImageOps.exif_transpose(file)
            atoms = [
                score_atom(answerer(), image, question, answer, settings.protocol)
                for question, answer in prompts[number]["vqa_list"]
            ]
        return json.dumps(atoms).encode()

    fill(products, settings.out / "claims" / "scores", scores, progress)
    return [read_json(product.path, SCORES) for product in products]


def score_prompts(
    scores: list[list[float]], prompts: list[Prompt], mean: Callable[[list[float]], float]
) -> dict[str, dict[str, float]]:
    """Return the score of every prompt in percent, in one group: the benchmark has no tasks."""
    return {
        "prompts": {
            prompt_key(number, prompt["prompt"]): 100 * float(mean(atoms))
            for number, (prompt, atoms) in enumerate(zip(prompts, scores, strict=True))
        }
    }


def table(results: dict[str, Any]) -> str:
    """Return the scores as Markdown tables, with what they differ in from published ones."""
    skills, atomicities = results["skills_am"], results["atomicities_gm"]
    header = ["GenEval 2", "AM", "GM", *skills, *(f"{count} atoms" for count in atomicities)]
    means = [
        with_error(results["soft_tifa_am"], results["standard_error_am"], digits=2),
        with_error(results["soft_tifa_gm"], results["standard_error"], digits=2),
    ]
    numbers = [f"{number:.2f}" for number in (*skills.values(), *atomicities.values())]
    notes = "".join(f"- {note}\n" for note in results["differences"])
    return f"{markdown_table(header, [[results['protocol'], *means, *numbers]])}\n{notes}"


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
