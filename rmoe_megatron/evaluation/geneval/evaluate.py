"""GenEval from prompts to scores: images in the published layout, judged by all ranks, summed up by rank 0."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import TypeAdapter

from rmoe_megatron.distributed.device import inference_device
from rmoe_megatron.distributed.launch import local_rank, rank
from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.early_judge import EarlyJudge
from rmoe_megatron.evaluation.geneval.colors import ColorClassifier
from rmoe_megatron.evaluation.geneval.detector import Detector
from rmoe_megatron.evaluation.geneval.prompts import Metadata, is_official, read_metadata
from rmoe_megatron.evaluation.geneval.rules import QUIRKS, Detection, judge, keep_most_confident
from rmoe_megatron.evaluation.limits import heading, main_score, of_a_part
from rmoe_megatron.evaluation.results import (
    Box,
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
from rmoe_megatron.files import atomic
from rmoe_megatron.files.images import open_picture
from rmoe_megatron.files.untrusted import read_json
from rmoe_megatron.inference.fingerprints import model_digest
from rmoe_megatron.inference.generation import ImageRequest, Picture, Progress, Sampling, fill, generate
from rmoe_megatron.inference.provenance import Product, Record, digest
from rmoe_megatron.pretrained.hub import model_folder
from rmoe_megatron.pretrained.model_files import judge_parts
from rmoe_megatron.versions import INFERENCE, versions_of

THRESHOLD, COUNTING_THRESHOLD, MAX_OBJECTS = 0.3, 0.9, 16  # of scores; objects per class
DETECTOR, CLIP = "facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"
METADATA_FILE = "metadata.jsonl"  # beside the samples of a prompt
EXAMPLES_PER_TASK = 3
JUDGED = TypeAdapter(list[dict[str, Any]])


@dataclass(frozen=True)
class Settings:
    """What is judged by which models and rules; all of it is part of the result."""

    out: Path
    images_per_prompt: int = 4
    protocol: RuleSet = RuleSet.official
    detector: str = DETECTOR
    clip: str = CLIP
    again: bool = False  # make anew what was made by another command, which is refused otherwise
    chosen: tuple[int, ...] | None = None  # numbers of the prompts to be scored; None is all
    allow_incomplete: bool = False  # score what a folder of images has


@dataclass(frozen=True)
class Judges:
    """Who finds objects, and who tells their colours."""

    detector: Detector
    classifier: ColorClassifier

    def to(self, device: torch.device) -> Self:
        """Move both models."""
        self.detector.to(device)
        self.classifier.to(device)
        return self


def evaluate_geneval(
    prompts: list[Metadata],
    sampling: Sampling,
    settings: Settings,
    progress: Callable[[str], Progress | None],
) -> None:
    """Make the images, unless the model is a folder of them, judge them and write the results; every rank takes part.

    ``out`` gets images as ``images/00000/samples/00000.png`` beside ``metadata.jsonl``, verdicts as ``judged/00000.json``, and
    ``results.json``, ``results.md``, ``gallery.png``. What is there is not done again.

    Args:
        progress: makes a progress bar with a title.

    Raises:
        UserError: images are missing, or a model is not here and cannot be downloaded.
    """
    out, numbers = settings.out, settings.chosen or range(len(prompts))

    def requests_below(folder: Path, numbers: Sequence[int] = numbers) -> list[ImageRequest]:
        return [
            ImageRequest(
                prompts[number]["prompt"],
                number,
                image,
                folder / f"{number:05d}" / "samples" / f"{image:05d}.png",
            )
            for number in numbers
            for image in range(settings.images_per_prompt)
        ]

    def layout(folder: Path) -> list[ImageRequest]:
        return requests_below(folder, range(len(prompts)))

    if sampling.is_given:
        require_metadata(prompts, Path(sampling.model))
    pictures, made = plan(requests_below, sampling, out, settings.allow_incomplete, layout)
    identity: Record = {
        "benchmark": "GenEval",
        "protocol": settings.protocol.value,
        "images_per_prompt": settings.images_per_prompt,
        "prompt_set": {"number": len(numbers), "sha256": digest([prompts[number] for number in numbers])},
        "sampling": made,
        "judge": judge_record(settings),
    }
    of_prompt = grouped_by_prompt(pictures)
    verdicts = answer_products(
        [out / "judged" / f"{number:05d}.{settings.protocol.value}.json" for number in of_prompt],
        [prompts[number] for number in of_prompt],
        list(of_prompt.values()),
        {"protocol": settings.protocol.value, "judge": identity["judge"]},
    )
    check_out(out, [*products_of(pictures), *verdicts], identity, settings.again)
    judges = EarlyJudge(
        lambda: _load_judges(settings), is_needed=not all(verdict.is_made for verdict in verdicts)
    )
    generate([(sampling, pictures)], out / "claims" / "images", progress("sample"))
    if rank() == 0 and not sampling.is_given:
        for number in numbers:
            atomic.write(out / "images" / f"{number:05d}" / METADATA_FILE, json.dumps(prompts[number]))
    judged = judge_all(prompts, pictures, verdicts, settings, judges, progress("judge"))
    if rank() == 0:
        results = summarise(judged, prompts, identity, sampling, settings)
        write_results(out, results, table(results), _examples(judged))


def require_metadata(prompts: list[Metadata], folder: Path) -> None:
    """Check that a folder of images is of these prompts, where it says of which it is, as the published code's does.

    Raises:
        UserError: it is of other prompts; names the first.
    """
    for number, metadata in enumerate(prompts):
        path = folder / f"{number:05d}" / METADATA_FILE
        if path.is_file():
            (said, *more) = read_metadata(path)
            if more or said != metadata:
                raise UserError(
                    f"{path} says {said['prompt']!r:.80}, but prompt {number} is {metadata['prompt']!r:.80}; give the prompts of the "
                    "folder with --metadata."
                )


def judge_record(settings: Settings) -> Record:
    """Return what the verdicts depend on besides pictures and prompts."""
    return {
        "detector_sha256": model_digest(model_folder(settings.detector, judge_parts)),
        "clip_sha256": model_digest(model_folder(settings.clip, judge_parts)),
        "device": inference_device(local_rank()).type,
        "versions": versions_of(*INFERENCE),
    }


def judge_all(
    prompts: list[Metadata],
    pictures: list[Picture],
    verdicts: list[Product],
    settings: Settings,
    judges: Callable[[], Judges],
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """Judge the images of every prompt that is not judged yet; returns all verdicts, of all ranks."""
    of_prompt = grouped_by_prompt(pictures)
    numbers = list(of_prompt)

    def judged(place: int) -> bytes:
        number, found = numbers[place], []
        for picture in of_prompt[number]:
            path = picture.request.path
            with open_picture(path) as file:
                verdict = judge_image(
                    ImageOps.exif_transpose(file), prompts[number], judges(), settings.protocol
                )
            found.append({"filename": str(path)} | verdict)
        return json.dumps(found).encode()

    fill(verdicts, settings.out / "claims" / "judged", judged, progress)
    return [verdict for product in verdicts for verdict in read_json(product.path, JUDGED)]


def _load_judges(settings: Settings) -> Judges:
    return load_judges(settings.detector, settings.clip)


def load_judges(detector: str, clip: str) -> Judges:
    """Load both models onto this rank's device.

    Raises:
        UserError: one of them is not here and cannot be downloaded.
    """
    device = inference_device(local_rank())
    finds = Detector(model_folder(detector, judge_parts), device)
    return Judges(finds, ColorClassifier(model_folder(clip, judge_parts), device))


def judge_image(image: Image.Image, metadata: Metadata, judges: Judges, protocol: RuleSet) -> dict[str, Any]:
    """Return the verdict of one image in the form of the published results without its file's name, and its detections."""
    image = image.convert("RGB")
    threshold = COUNTING_THRESHOLD if metadata["tag"] == "counting" else THRESHOLD
    kept = {
        name: keep_most_confident(found, threshold, MAX_OBJECTS)
        for name, found in judges.detector.detect(image).items()
    }
    detected = {name: found for name, found in kept.items() if found}

    def color_of(objects: list[Detection], name: str) -> list[str]:
        return judges.classifier.classify(image, objects, name)

    verdict = judge(detected, metadata, color_of, protocol)
    return {
        "tag": metadata["tag"], "prompt": metadata["prompt"], "correct": verdict.correct,
        "reason": verdict.reason,
        "details": {name: [[*each.box, each.score] for each in found] for name, found in detected.items()},
    }  # fmt: skip


def summarise(
    judged: list[dict[str, Any]],
    prompts: list[Metadata],
    identity: Record,
    sampling: Sampling,
    settings: Settings,
) -> dict[str, Any]:
    """Return the results: the share of right images per task, and the mean of the tasks as the overall score."""
    by_task: dict[str, list[bool]] = defaultdict(list)
    by_prompt: dict[str, list[bool]] = defaultdict(list)
    for verdict in judged:
        by_task[verdict["tag"]].append(verdict["correct"])
        by_prompt[Path(verdict["filename"]).parts[-3]].append(verdict["correct"])
    prompt_scores: dict[str, dict[str, float]] = defaultdict(dict)
    for number, verdicts in by_prompt.items():
        metadata = prompts[int(number)]
        name = prompt_key(int(number), metadata["prompt"])
        prompt_scores[metadata["tag"]][name] = float(np.mean(verdicts))
    tasks = {name: float(np.mean(verdicts)) for name, verdicts in by_task.items()}
    complete = settings.chosen is None and is_official(prompts) and settings.images_per_prompt == 4
    overall = {
        "overall": float(np.mean(list(tasks.values()))),
        "standard_error": standard_error(prompt_scores),
    }
    return identity | {
        "model": str(Path(sampling.model).absolute()),
        "detector": settings.detector,
        "clip": settings.clip,
        "quirks": QUIRKS if settings.protocol is RuleSet.official else [],
        "differences": [
            f"detector {settings.detector} through transformers, in place of mmdet's weights of the same architecture",
            *([] if complete else ["not the published 553 prompts with 4 images each"]),
            *folder_differences(identity["sampling"]),
        ],
        **of_a_part(overall, settings.chosen, len(prompts)),
        "tasks": tasks,
        "images_right": float(np.mean([verdict["correct"] for verdict in judged])),
        "prompts_right": float(np.mean([any(verdicts) for verdicts in by_prompt.values()])),
        "prompts": len(by_prompt),
        "images_judged": len(judged),
        "prompt_scores": prompt_scores,
    }


def table(results: dict[str, Any]) -> str:
    """Return the scores as a Markdown table, with what they differ in from published ones."""
    header = ["GenEval", heading(results, "overall"), *results["tasks"], "images"]
    score, error = (main_score(results, name) for name in ("overall", "standard_error"))
    row = [results["protocol"], with_error(score, error, digits=4)]
    row += [f"{score:.4f}" for score in results["tasks"].values()]
    notes = "".join(f"- {note}\n" for note in results["differences"])
    return f"{markdown_table(header, [[*row, str(results['images_judged'])]])}\n{notes}"


def _examples(judged: list[dict[str, Any]]) -> list[Example]:
    """Return right and wrong images of every task with what was found in them, each of another prompt."""
    taken: dict[tuple[bool, str], set[str]] = defaultdict(set)
    examples = []
    for verdict in sorted(judged, key=lambda verdict: not verdict["correct"]):
        prompts = taken[verdict["correct"], verdict["tag"]]
        if len(prompts) == EXAMPLES_PER_TASK or verdict["prompt"] in prompts:
            continue
        prompts.add(verdict["prompt"])
        reason = verdict["reason"].splitlines()[0] if verdict["reason"] else "right"
        boxes = tuple(
            Box(name, *found[:4]) for name, objects in verdict["details"].items() for found in objects
        )
        title = "right" if verdict["correct"] else "wrong"
        examples.append(Example(title, Path(verdict["filename"]), f"{verdict['prompt']}: {reason}", boxes))
    return examples
