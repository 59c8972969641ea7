"""T2I-CoReBench from prompts to scores: four images a prompt, asked by all ranks, summed up by rank 0."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from rmoe_megatron.distributed.device import inference_device
from rmoe_megatron.distributed.launch import local_rank, rank
from rmoe_megatron.evaluation.corebench.judging import (
    JUDGES,
    OUR_WORDING,
    QUIRKS,
    Wording,
    ask,
    judging_record,
    verdict,
)
from rmoe_megatron.evaluation.corebench.prompts import (
    COMPOSITION,
    DIMENSIONS,
    REASONING,
    Prompt,
    is_official,
)
from rmoe_megatron.evaluation.early_judge import EarlyJudge
from rmoe_megatron.evaluation.limits import heading, main_score, of_a_part
from rmoe_megatron.evaluation.question_answering import Qwen3VL
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
    grouped_by_prompt,
    plan,
    products_of,
)
from rmoe_megatron.files.images import open_picture
from rmoe_megatron.files.untrusted import read_json
from rmoe_megatron.inference.fingerprints import model_digest
from rmoe_megatron.inference.generation import ImageRequest, Picture, Progress, Sampling, fill, generate
from rmoe_megatron.inference.provenance import Product, Record, digest, read_record
from rmoe_megatron.pretrained.hub import is_of_the_hub, model_folder
from rmoe_megatron.pretrained.model_files import judge_parts
from rmoe_megatron.versions import INFERENCE, versions_of

ANSWERS = TypeAdapter(list[list[str]])
IMAGES_PER_PROMPT = 4
EXAMPLES = 6  # best and worst


@dataclass(frozen=True)
class Settings:
    """What is asked by which model, wording and rules."""

    out: Path
    images_per_prompt: int = IMAGES_PER_PROMPT
    protocol: RuleSet = RuleSet.official
    answerer: str = JUDGES[0]
    wording: Wording = Wording("ours", OUR_WORDING)
    again: bool = False  # make anew what was made by another command, which is refused otherwise
    chosen: tuple[int, ...] | None = None  # numbers of the prompts to be scored; None is all
    allow_incomplete: bool = False  # score what a folder of images has


def evaluate_corebench(
    prompts: list[Prompt], sampling: Sampling, settings: Settings, progress: Callable[[str], Progress | None]
) -> None:
    """Make the images (``C-MI/C-MI-001-0.png``), unless the model is a folder of them, ask the questions and write the results.

    Every rank takes part. What is there is not done again.

    Args:
        progress: makes a progress bar with a title.

    Raises:
        UserError: images are missing, or a model is not here and cannot be downloaded.
    """
    out, numbers = settings.out, settings.chosen or range(len(prompts))

    def requests(folder: Path, numbers: Sequence[int] = numbers) -> list[ImageRequest]:
        return [
            ImageRequest(
                prompts[number].text,
                number,
                image,
                folder / prompts[number].dimension / f"{prompts[number].name}-{image}.png",
            )
            for number in numbers
            for image in range(settings.images_per_prompt)
        ]

    def layout(folder: Path) -> list[ImageRequest]:
        return requests(folder, range(len(prompts)))

    pictures, made = plan(requests, sampling, out, settings.allow_incomplete, layout)
    judge_made_of = {
        "answerer_sha256": model_digest(model_folder(settings.answerer, judge_parts)),
        **judging_record(settings.wording),
        "device": inference_device(local_rank()).type,
        "versions": versions_of(*INFERENCE),
    }
    identity: Record = {
        "benchmark": "T2I-CoReBench",
        "protocol": rules(prompts, settings),
        "images_per_prompt": settings.images_per_prompt,
        "prompt_set": {
            "number": len(numbers),
            "sha256": digest([asdict(prompts[number]) for number in numbers]),
        },
        "sampling": made,
        "judge": judge_made_of,
    }
    of_prompt = grouped_by_prompt(pictures)
    products = answer_products(
        [out / "answers" / f"{prompts[number].name}.json" for number in of_prompt],
        [asdict(prompts[number]) for number in of_prompt],
        list(of_prompt.values()),
        {"judge": judge_made_of},
    )
    check_out(out, [*products_of(pictures), *products], identity, settings.again)
    answerer = EarlyJudge(
        lambda: Qwen3VL(settings.answerer), is_needed=not all(product.is_made for product in products)
    )
    generate([(sampling, pictures)], out / "claims" / "images", progress("sample"))
    answers = ask_all(prompts, of_prompt, products, settings, answerer, progress("ask"))
    if rank() == 0:
        scores = image_scores(answers, settings.protocol)
        results = identity | {
            "model": str(Path(sampling.model).absolute()),
            "answerer": settings.answerer,
            "quirks": QUIRKS if settings.protocol is RuleSet.official else [],
            "differences": differences(prompts, settings) + folder_differences(made),
            **summarise(scores, prompts, settings.chosen),
            "prompts": len(of_prompt),
            "images_judged": len(pictures),
            "questions": sum(len(of_image) for images in answers.values() for of_image in images),
            "neither_yes_nor_no": sum(
                verdict(answer, RuleSet.official) is None
                for images in answers.values()
                for of_image in images
                for answer in of_image
            ),
            "prompt_scores": score_prompts(scores, prompts),
        }
        write_results(out, results, table(results), _examples(scores, prompts, of_prompt))


def rules(prompts: list[Prompt], settings: Settings) -> str:
    """Return what the rules are called: scores by other rules, wordings or judges are never taken for each other.

    They are ``official`` only with the published prompts, wording and number of images and a published judge.
    """
    judge = settings.answerer.rstrip("/").rsplit("/", 1)[-1]
    if not differences(prompts, replace(settings, chosen=None)):
        return f"official, judge {judge}"
    wording = f"{settings.wording.name} {settings.wording.sha256[:8]}"
    return f"{settings.protocol.value} rules for answers, wording {wording}, judge {judge}"


def differences(prompts: list[Prompt], settings: Settings) -> list[str]:
    """Return in what a result differs from a published one; nothing if it may be called official."""
    found = []
    if settings.wording.name != "official":
        found.append(
            f"the judge is asked in the wording {settings.wording.name} (SHA-256 {settings.wording.sha256[:16]}), not in the published one"
        )
    if not _is_published(settings.answerer):
        found.append(
            f"asked of {settings.answerer}, not of a published judge ({', '.join(JUDGES)}): not comparable"
        )
    if settings.protocol is not RuleSet.official:
        found.append("answers are read by repaired rules")
    if settings.chosen is not None or not is_official(prompts):
        found.append("not the published 1,080 prompts")
    if settings.images_per_prompt != IMAGES_PER_PROMPT:
        found.append(f"not {IMAGES_PER_PROMPT} images a prompt")
    return found


def _is_published(answerer: str) -> bool:
    return any(is_of_the_hub(answerer, judge) for judge in JUDGES)


def ask_all(
    prompts: list[Prompt],
    of_prompt: dict[int, list[Picture]],
    products: list[Product],
    settings: Settings,
    answerer: Callable[[], Qwen3VL],
    progress: Progress | None,
) -> dict[int, list[list[str]]]:
    """Ask about the images of every prompt that is not answered yet.

    Returns:
        The answers of all ranks to every question, by prompt and image.
    """
    numbers = list(of_prompt)

    def answers(place: int) -> bytes:
        number, of_images = numbers[place], []
        for picture in of_prompt[number]:
            path = picture.request.path
            is_made_here = read_record(path) is not None
            with open_picture(path) as image:
                of_images.append(ask(answerer(), image, prompts[number], settings.wording, is_made_here))
        return json.dumps(of_images).encode()

    fill(products, settings.out / "claims" / "answers", answers, progress)
    return {
        number: read_json(product.path, ANSWERS) for number, product in zip(numbers, products, strict=True)
    }


def image_scores(answers: dict[int, list[list[str]]], protocol: RuleSet) -> dict[int, list[float | None]]:
    """Return the share of yes of every image, by prompt; None where no answer is yes or no."""

    def share(of_image: list[str]) -> float | None:
        verdicts = [found for answer in of_image if (found := verdict(answer, protocol)) is not None]
        return sum(verdicts) / len(verdicts) if verdicts else None

    return {number: [share(of_image) for of_image in images] for number, images in answers.items()}


def score_prompts(
    scores: dict[int, list[float | None]], prompts: list[Prompt]
) -> dict[str, dict[str, float]]:
    """Return the mean score of the images of every prompt in percent, by dimension."""
    found: dict[str, dict[str, float]] = {}
    for number, of_images in scores.items():
        valid = [share for share in of_images if share is not None]
        if valid:
            of_dimension = found.setdefault(prompts[number].dimension, {})
            of_dimension[prompt_key(number, prompts[number].text)] = 100 * float(np.mean(valid))
    return {name: found[name] for name in DIMENSIONS if name in found}


def summarise(
    scores: dict[int, list[float | None]], prompts: list[Prompt], chosen: tuple[int, ...] | None
) -> dict[str, Any]:
    """Return the scores in percent: a dimension's is the mean over its images, all others are means over dimensions."""
    by_dimension: dict[str, list[float]] = {}
    for number, of_images in scores.items():
        valid = [share for share in of_images if share is not None]
        by_dimension.setdefault(prompts[number].dimension, []).extend(valid)
    dimensions = {
        name: 100 * float(np.mean(by_dimension[name])) for name in DIMENSIONS if by_dimension.get(name)
    }

    def mean(names: Sequence[str]) -> float | None:
        there = [dimensions[name] for name in names if name in dimensions]
        return float(np.mean(there)) if there else None

    main = {
        "overall": mean(DIMENSIONS),
        "standard_error": standard_error(score_prompts(scores, prompts)),
        "composition": mean(COMPOSITION),
        "reasoning": mean(REASONING),
    }
    return of_a_part(main, chosen, len(prompts)) | {"dimensions": dimensions}


def table(results: dict[str, Any]) -> str:
    """Return the scores as Markdown tables, with what they differ in from published ones."""
    dimensions = results["dimensions"]
    header = ["T2I-CoReBench", heading(results, "overall"), "composition", "reasoning", *dimensions]
    overall, error = (main_score(results, name) for name in ("overall", "standard_error"))
    row = [results["protocol"], "-" if overall is None else with_error(overall, error, digits=2)]
    means = [main_score(results, name) for name in ("composition", "reasoning")]
    row += ["-" if score is None else f"{score:.2f}" for score in (*means, *dimensions.values())]
    judge = results["judge"]
    said = f"wording of the judge's instructions: {judge['wording']}, SHA-256 {judge['wording_sha256']}"
    notes = "".join(f"- {note}\n" for note in (*results["differences"], said))
    return f"{markdown_table(header, [row])}\n{notes}"


def _examples(
    scores: dict[int, list[float | None]], prompts: list[Prompt], of_prompt: dict[int, list[Picture]]
) -> list[Example]:
    """Return the best and the worst prompts, each with its first image that has a score."""
    first = {
        number: next((place, share) for place, share in enumerate(of_images) if share is not None)
        for number, of_images in scores.items()
        if any(share is not None for share in of_images)
    }
    order = sorted(first, key=lambda number: -first[number][1])
    chosen = {"best": order[:EXAMPLES], "worst": order[EXAMPLES:][-EXAMPLES:]}
    return [
        Example(title, of_prompt[number][place].request.path, f"{share:.2f} {prompts[number].text}")
        for title, numbers in chosen.items()
        for number in numbers
        for place, share in [first[number]]
    ]
