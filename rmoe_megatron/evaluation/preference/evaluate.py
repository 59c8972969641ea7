"""Preference scores of a folder of pictures: given by all ranks, summed up by rank 0."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import TypeAdapter

from rmoe_megatron.distributed.device import inference_device
from rmoe_megatron.distributed.launch import local_rank, rank
from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.early_judge import EarlyJudge
from rmoe_megatron.evaluation.preference import hpsv3, pickscore
from rmoe_megatron.evaluation.preference.captioned_folder import read_pictures
from rmoe_megatron.evaluation.results import (
    Example,
    markdown_table,
    standard_error,
    with_error,
    write_results,
)
from rmoe_megatron.evaluation.workspace import answer_products, check_out, folder_differences, given_record
from rmoe_megatron.files.images import open_picture
from rmoe_megatron.files.untrusted import read_json
from rmoe_megatron.inference.fingerprints import file_digest, model_digest
from rmoe_megatron.inference.generation import Picture, Progress, fill
from rmoe_megatron.inference.provenance import Record, digest
from rmoe_megatron.pretrained.hub import is_of_the_hub, model_folder
from rmoe_megatron.pretrained.model_files import judge_parts
from rmoe_megatron.versions import INFERENCE, versions_of

SCORE = TypeAdapter(float)
EXAMPLES = 6  # best and worst


class Scorer(Protocol):
    """Tells how much people would like a picture for its prompt."""

    def to(self, device: torch.device) -> Self:
        """Move the model."""
        ...

    def score(self, image: Image.Image, prompt: str) -> float:
        """Return the score; larger is better."""
        ...


class ScorerName(Enum):
    """The scorers that there are."""

    pickscore = "pickscore"
    hpsv3 = "hpsv3"


NAMES = {ScorerName.pickscore: "PickScore", ScorerName.hpsv3: "HPSv3"}
MODELS = {
    ScorerName.pickscore: (pickscore.WEIGHTS, pickscore.BASE),
    ScorerName.hpsv3: (hpsv3.WEIGHTS, hpsv3.BASE),
}  # of the hub: weights, and what the rest is taken from


@dataclass(frozen=True)
class Settings:
    """What is scored by which model.

    Attributes:
        captions: the prompts of the pictures; None takes what they say themselves.
        weights: folder or repository of the scorer's weights; None is the published one.
        base: folder or repository of its tokenizer and image processor; None is the published one.
        instruction: HPSv3's, and of no other scorer.
    """

    folder: Path
    out: Path
    scorer: ScorerName
    captions: Path | None = None
    weights: str | None = None
    base: str | None = None
    instruction: hpsv3.Instruction | None = None
    again: bool = False  # make anew what was made by another command, which is refused otherwise
    allow_incomplete: bool = False  # score what the folder has

    @property
    def models(self) -> tuple[str, str]:
        """Weights and base, with the published ones where none is named."""
        weights, base = MODELS[self.scorer]
        return self.weights or weights, self.base or base


def evaluate_preference(settings: Settings, progress: Callable[[str], Progress | None]) -> None:
    """Score the pictures and write the results; every rank takes part, and what is there is not done again.

    Raises:
        UserError: something is wrong with the folder, or a model is not here and cannot be downloaded.
    """
    out, folder = settings.out, settings.folder
    if out.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"--out {out} lies in {folder}, whose pictures are scored; choose a folder outside of it."
        )
    if (settings.instruction is None) is (settings.scorer is ScorerName.hpsv3):
        raise UserError(
            "--scorer hpsv3 needs --instruction FILE, HPSv3's instruction as a text file, and no other scorer takes one."
        )
    pictures, problems = read_pictures(folder, settings.captions, settings.allow_incomplete)
    made = given_record(pictures) | ({"folder": problems} if problems else {})
    prompts = [picture.request.prompt for picture in pictures]
    judge = _judge_record(settings)
    identity: Record = {
        "benchmark": NAMES[settings.scorer],
        "protocol": rules(judge),
        "prompt_set": {"number": len(set(prompts)), "sha256": digest(prompts)},
        "sampling": made,
        "judge": judge,
    }
    products = answer_products(
        [out / "scores" / f"{picture.request.path.relative_to(folder)}.json" for picture in pictures],
        prompts,
        [[picture] for picture in pictures],
        {"judge": judge},
    )
    check_out(out, products, identity, settings.again)
    scorer = EarlyJudge(lambda: _load(settings), is_needed=not all(product.is_made for product in products))

    def score(number: int) -> bytes:
        with open_picture(pictures[number].request.path) as image:
            return json.dumps(scorer().score(ImageOps.exif_transpose(image), prompts[number])).encode()

    fill(products, out / "claims" / "scores", score, progress("score"))
    if rank() == 0:
        scores = [read_json(product.path, SCORE) for product in products]
        of_prompts = score_prompts(pictures, scores)
        results = identity | {
            "folder": str(folder.absolute()),
            "scorer": dict(zip(("weights", "base"), settings.models, strict=True)),
            "differences": _differences(settings) + folder_differences(made),
            "score": float(np.mean(list(of_prompts["prompts"].values()))),
            "standard_error": standard_error(of_prompts),
            "prompts": len(of_prompts["prompts"]),
            "images": len(pictures),
            "prompt_scores": of_prompts,
        }
        write_results(out, results, table(results), _examples(pictures, scores))


def rules(judge: Record) -> str:
    """Return what the scores are by: those of other weights or of another instruction are never compared with them."""
    instruction = judge.get("instruction_sha256")
    return f"weights {judge['weights_sha256']}" + (f", instruction {instruction[:16]}" if instruction else "")


def score_prompts(pictures: list[Picture], scores: list[float]) -> dict[str, dict[str, float]]:
    """Return the mean score of the pictures of every prompt, by its text, so that folders of the same prompts are compared by it."""
    of_prompt: dict[str, list[float]] = {}
    for picture, score in zip(pictures, scores, strict=True):
        of_prompt.setdefault(picture.request.prompt, []).append(score)
    return {"prompts": {prompt: float(np.mean(each)) for prompt, each in sorted(of_prompt.items())}}


def _judge_record(settings: Settings) -> Record:
    """Return what a score depends on besides picture and prompt."""
    weights, base = settings.models
    record: Record = {
        "scorer": settings.scorer.value,
        "device": inference_device(local_rank()).type,
        "versions": versions_of(*INFERENCE),
    }
    if settings.instruction is None:
        record["weights_sha256"] = model_digest(model_folder(weights, judge_parts))
        record["base_sha256"] = model_digest(model_folder(base, hpsv3.base_parts))
        return record
    record["weights_sha256"] = file_digest(model_folder(weights, hpsv3.weight_parts) / hpsv3.FILE)
    record["base_sha256"] = model_digest(model_folder(base, hpsv3.base_parts))
    record["instruction_sha256"] = settings.instruction.sha256
    return record


def _load(settings: Settings) -> Scorer:
    weights, base = settings.models
    if settings.instruction is None:
        return load_pickscore(weights, base)
    folders = model_folder(weights, hpsv3.weight_parts), model_folder(base, hpsv3.base_parts)
    return hpsv3.HPSv3(*folders, settings.instruction, inference_device(local_rank()))


def load_pickscore(weights: str, base: str) -> pickscore.PickScore:
    """Load PickScore onto this rank's device.

    Raises:
        UserError: a model is not here and cannot be downloaded.
    """
    folders = model_folder(weights, judge_parts), model_folder(base, hpsv3.base_parts)
    return pickscore.PickScore(*folders, inference_device(local_rank()))


def _differences(settings: Settings) -> list[str]:
    """Return in what the scores differ from those of the published scorer."""
    found = [
        f"{part} of {name}, not of {published}"
        for part, name, published in zip(
            ("weights", "tokenizer and image processor"),
            settings.models,
            MODELS[settings.scorer],
            strict=True,
        )
        if not is_of_the_hub(name, published)
    ]
    if settings.instruction is not None and not settings.instruction.is_published:
        found.append(
            f"another instruction than the published one (SHA-256 {settings.instruction.sha256[:16]})"
        )
    return found


def table(results: dict[str, Any]) -> str:
    """Return the score as a Markdown table, with what it differs in from the published scorer's."""
    score = with_error(results["score"], results["standard_error"], digits=3)
    header = [results["benchmark"], "score", "prompts", "images"]
    row = [Path(results["folder"]).name, score, str(results["prompts"]), str(results["images"])]
    notes = "".join(f"- {note}\n" for note in results["differences"])
    return f"{markdown_table(header, [row])}\n{notes}"


def _examples(pictures: list[Picture], scores: list[float]) -> list[Example]:
    order = sorted(range(len(scores)), key=lambda number: -scores[number])
    chosen = {"best": order[:EXAMPLES], "worst": order[EXAMPLES:][-EXAMPLES:]}
    return [
        Example(
            title, pictures[number].request.path, f"{scores[number]:.2f} {pictures[number].request.prompt}"
        )
        for title, numbers in chosen.items()
        for number in numbers
    ]
