"""GenEval 2 from prompts to scores: one image a prompt, asked by all ranks, summed up by rank 0."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageOps
from pydantic import TypeAdapter

from rmoe_megatron.distributed.device import inference_device
from rmoe_megatron.distributed.launch import local_rank, rank
from rmoe_megatron.evaluation.early_judge import EarlyJudge
from rmoe_megatron.evaluation.geneval2.prompts import Prompt, is_official
from rmoe_megatron.evaluation.geneval2.soft_tifa import (
    QUIRKS,
    geometric_mean,
    score_atom,
    summarise,
)
from rmoe_megatron.evaluation.limits import heading, main_score, of_a_part
from rmoe_megatron.evaluation.question_answering import QWEN3_VL, Qwen3VL
from rmoe_megatron.evaluation.results import (
    Example,
    markdown_table,
    prompt_key,
    standard_error,
    with_error,
    write_results,
)
from rmoe_megatron.evaluation.rule_set import RuleSet
from rmoe_megatron.evaluation.workspace import (
    answer_products,
    check_out,
    folder_differences,
    plan,
    products_of,
)
from rmoe_megatron.files.images import open_picture
from rmoe_megatron.files.untrusted import read_json
from rmoe_megatron.inference.fingerprints import model_digest
from rmoe_megatron.inference.generation import ImageRequest, Picture, Progress, Sampling, fill, generate
from rmoe_megatron.inference.provenance import Product, Record, digest
from rmoe_megatron.pretrained.hub import is_of_the_hub, model_folder
from rmoe_megatron.pretrained.model_files import judge_parts
from rmoe_megatron.versions import INFERENCE, versions_of

SCORES = TypeAdapter(list[float])
EXAMPLES = 6  # best and worst


@dataclass(frozen=True)
class Settings:
    """What is asked by which model and rules."""

    out: Path
    protocol: RuleSet = RuleSet.official
    answerer: str = QWEN3_VL
    again: bool = False  # make anew what was made by another command, which is refused otherwise
    chosen: tuple[int, ...] | None = None  # numbers of the prompts to be scored; None is all
    allow_incomplete: bool = False  # score what a folder of images has


def evaluate_geneval2(
    prompts: list[Prompt], sampling: Sampling, settings: Settings, progress: Callable[[str], Progress | None]
) -> None:
    """Make the images (``00000.png``), unless the model is a folder of them, ask the questions and write the results.

    Every rank takes part. What is there is not done again.

    Args:
        progress: makes a progress bar with a title.

    Raises:
        UserError: images are missing, or a model is not here and cannot be downloaded.
    """
    numbers = settings.chosen or range(len(prompts))

    def requests(folder: Path, numbers: Sequence[int] = numbers) -> list[ImageRequest]:
        return [
            ImageRequest(prompts[number]["prompt"], number, 0, folder / f"{number:05d}.png")
            for number in numbers
        ]

    def layout(folder: Path) -> list[ImageRequest]:
        return requests(folder, range(len(prompts)))

    pictures, made = plan(requests, sampling, settings.out, settings.allow_incomplete, layout)
    everything, prompts = prompts, [prompts[picture.request.prompt_index] for picture in pictures]
    answerer_made_of = {
        "answerer_sha256": model_digest(model_folder(settings.answerer, judge_parts)),
        "device": inference_device(local_rank()).type,
        "versions": versions_of(*INFERENCE),
    }
    identity: Record = {
        "benchmark": "GenEval 2",
        "protocol": settings.protocol.value,
        "prompt_set": {"number": len(numbers), "sha256": digest([everything[number] for number in numbers])},
        "sampling": made,
        "judge": answerer_made_of,
    }
    products = answer_products(
        [
            settings.out / "scores" / f"{picture.request.prompt_index:05d}.{settings.protocol.value}.json"
            for picture in pictures
        ],
        prompts,
        [[picture] for picture in pictures],
        {"protocol": settings.protocol.value, "judge": answerer_made_of},
    )
    check_out(settings.out, [*products_of(pictures), *products], identity, settings.again)
    answerer = EarlyJudge(
        lambda: Qwen3VL(settings.answerer), is_needed=not all(product.is_made for product in products)
    )
    generate([(sampling, pictures)], settings.out / "claims" / "images", progress("sample"))
    images = [picture.request for picture in pictures]
    scores = ask_all(prompts, images, products, settings, answerer, progress("ask"))
    if rank() == 0:
        results = identity | {
            "model": str(Path(sampling.model).absolute()),
            "answerer": settings.answerer,
            "quirks": QUIRKS if settings.protocol is RuleSet.official else [],
            "differences": [
                *(
                    []
                    if is_of_the_hub(settings.answerer, QWEN3_VL)
                    else [f"asked of {settings.answerer}, not of {QWEN3_VL}"]
                ),
                *([] if is_official(prompts) else ["not the published 800 prompts"]),
                *folder_differences(made),
            ],
            **of_a_part(means(scores, pictures), settings.chosen, len(everything)),
            **summarise(scores, prompts),
            "prompts": len(prompts),
            "atoms": sum(len(atoms) for atoms in scores),
            "prompt_scores": score_prompts(scores, pictures, geometric_mean),
        }
        write_results(settings.out, results, table(results), _examples(scores, prompts, images))


def ask_all(
    prompts: list[Prompt],
    images: list[ImageRequest],
    products: list[Product],
    settings: Settings,
    answerer: Callable[[], Qwen3VL],
    progress: Progress | None,
) -> list[list[float]]:
    """Score the atoms of every image that is not scored yet; returns all scores, of all ranks."""

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
    scores: list[list[float]], pictures: list[Picture], mean: Callable[[list[float]], float]
) -> dict[str, dict[str, float]]:
    """Return the score of every prompt in percent, in one group: the benchmark has no tasks."""
    return {
        "prompts": {
            prompt_key(picture.request.prompt_index, picture.request.prompt): 100 * float(mean(atoms))
            for picture, atoms in zip(pictures, scores, strict=True)
        }
    }


def means(scores: list[list[float]], pictures: list[Picture]) -> dict[str, Any]:
    """Return both scores in percent, arithmetic and geometric over the atoms of a prompt, with their standard errors."""
    arithmetic, geometric = (score_prompts(scores, pictures, mean) for mean in (np.mean, geometric_mean))
    return {
        "soft_tifa_am": float(np.mean(list(arithmetic["prompts"].values()))),
        "soft_tifa_gm": float(np.mean(list(geometric["prompts"].values()))),
        "standard_error": standard_error(geometric),
        "standard_error_am": standard_error(arithmetic),
    }


def table(results: dict[str, Any]) -> str:
    """Return the scores as Markdown tables, with what they differ in from published ones."""
    skills, atomicities = results["skills_am"], results["atomicities_gm"]
    header = [
        "GenEval 2",
        heading(results, "AM"),
        "GM",
        *skills,
        *(f"{count} atoms" for count in atomicities),
    ]
    means = [
        with_error(main_score(results, "soft_tifa_am"), main_score(results, "standard_error_am"), digits=2),
        with_error(main_score(results, "soft_tifa_gm"), main_score(results, "standard_error"), digits=2),
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
