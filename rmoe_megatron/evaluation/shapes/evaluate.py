"""The toy shapes benchmark: images for the validation prompts, made by all ranks; detected, judged and summed up by rank 0."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rmoe_megatron.data.shapes.vocabulary import Skill
from rmoe_megatron.data.shards.dataset import ShardDataset
from rmoe_megatron.data.storage.store import LocalStore
from rmoe_megatron.distributed.launch import rank
from rmoe_megatron.evaluation.results import prompt_key, standard_error
from rmoe_megatron.evaluation.shapes.detector import detect, matches_scene
from rmoe_megatron.evaluation.shapes.report import JudgedImage, write_report
from rmoe_megatron.evaluation.shapes.rules import judge
from rmoe_megatron.evaluation.workspace import check_out, products_of
from rmoe_megatron.files.images import open_picture
from rmoe_megatron.inference.fingerprints import file_digest
from rmoe_megatron.inference.generation import (
    ImageRequest,
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

SPLITS = {"seen": "val", "heldout": "val_heldout"}

type Scenes = dict[str, list[dict[str, Any]]]  # samples of the set, by split


@dataclass(frozen=True)
class Settings:
    """What is scored.

    ``limit`` is prompts per split, spread evenly over the skills; None takes all.
    """

    data: Path
    out: Path
    images_per_prompt: int = 4
    limit: int | None = None
    again: bool = False  # make anew what was made by another command, which is refused otherwise


def evaluate_shapes(sampling: Sampling, settings: Settings, progress: Progress | None = None) -> None:
    """Make the images (``images/SPLIT/00000/00000.png``), judge them, and write ``results.json``, ``results.md``, ``examples.png``.

    Every rank takes part in making the images, and what is there is not made again; rank 0 judges them.

    Args:
        progress: called with (images done, images in total).

    Raises:
        UserError: the validation shards are missing, or ``out`` holds another evaluation.
    """
    LocalStore(
        settings.data / SPLITS["seen"]
    ).shards()  # a missing set is named before the model is looked at
    made, out = sampling_record(sampling), settings.out
    identity: Record = {
        "benchmark": "toy shapes",
        "images_per_prompt": settings.images_per_prompt,
        "prompt_set": set_record(settings.data) | {"limit": settings.limit},
        "sampling": made,
        "judge": {
            "detector": "connected areas of a colour, told by their form",
            "versions": versions_of("numpy", "scipy"),
        },
    }
    scenes = read_scenes(settings.data, settings.limit)
    requests = image_requests(scenes, settings.images_per_prompt, sampling.seed, out / "images")
    pictures = [Picture(request, image_product(request, made)) for request in requests]
    with filled_by_the_job(out):
        check_out(out, products_of(pictures), identity, settings.again)
        generate([(sampling, pictures)], out / ".claims", progress)
        if rank() == 0:
            results = identity | {"model": str(Path(sampling.model).absolute()), "seed": sampling.seed}
            _judge(scenes, requests, results, settings)


def _judge(scenes: Scenes, requests: Sequence[ImageRequest], results: Record, settings: Settings) -> None:
    """Judge all images, and write the results."""
    judged = judge_pictures(scenes, requests)
    results = results | {
        "detector_accuracy_on_ground_truth": detector_accuracy(scenes),
        "splits": {
            split: score([item for item in judged if item.split == split], settings.images_per_prompt)
            for split in scenes
        },
    }
    write_report(results, judged, settings.out)


def read_scenes(data: Path, limit: int | None) -> Scenes:
    """Return the scenes that are scored.

    Raises:
        UserError: the validation shards are missing.
    """
    return {
        split: _select(ShardDataset(data / folder, ["png", "json"]), limit)
        for split, folder in SPLITS.items()
        if split == "seen" or any((data / folder).glob("*.tar"))  # a set may hold out nothing
    }


def image_requests(scenes: Scenes, images_per_prompt: int, seed: int, folder: Path) -> list[ImageRequest]:
    """Return the images to make below ``folder``, those of a scene one after the other; each has a seed of its own."""
    return [
        ImageRequest(
            sample["json"]["caption"],
            prompt,
            image,
            folder / split / f"{prompt:05d}" / f"{image:05d}.png",
            seed_of(seed, split_number, prompt, image),
        )
        for split_number, (split, part) in enumerate(scenes.items())
        for prompt, sample in enumerate(part)
        for image in range(images_per_prompt)
    ]


def judge_pictures(scenes: Scenes, requests: Sequence[ImageRequest]) -> list[JudgedImage]:
    """Judge the images of :func:`image_requests` by the scenes that they should show."""
    judged = []
    for request in requests:
        split = request.path.parts[-3]
        scene = scenes[split][request.prompt_index]["json"]
        with open_picture(request.path) as file:
            image = np.asarray(file.convert("RGB"))
        verdict = judge(detect(image), scene["requirements"])
        judged.append(JudgedImage(split, scene["skill"], scene["caption"], image, verdict))
    return judged


def detector_accuracy(scenes: Scenes) -> float:
    """Return the share of the set's own pictures in which the detector finds just what is there."""
    right = [
        matches_scene(
            detect(sample["png"].transpose(1, 2, 0)),
            [(item["shape"], item["color"]) for item in sample["json"]["objects"]],
        )
        for part in scenes.values()
        for sample in part
    ]
    return float(np.mean(right))


def set_record(data: Path) -> dict[str, str]:
    """Return a digest of the shards of every split, as part of what an evaluation is of."""
    return {
        split: digest([file_digest(shard) for shard in sorted((data / folder).glob("*.tar"))])
        for split, folder in SPLITS.items()
    }


def score(judged: list[JudgedImage], images_per_prompt: int = 1) -> dict[str, Any]:
    """Return the share of right images per skill and their mean over skills, as GenEval defines them, with its standard error.

    The error is that of a bootstrap over prompts: images of a prompt are right or wrong together, so a prompt counts as one
    observation. None where a skill has a single prompt.

    Args:
        judged: the images of a prompt one after the other.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for item in judged:
        right[item.skill].append(item.verdict.correct)
    skills = {skill.value: float(np.mean(right[skill])) for skill in Skill if right[skill]}
    prompt_scores: dict[str, dict[str, float]] = defaultdict(dict)
    for number, first in enumerate(range(0, len(judged), images_per_prompt)):
        of_prompt = judged[first : first + images_per_prompt]
        name = prompt_key(number, of_prompt[0].caption)
        prompt_scores[of_prompt[0].skill][name] = float(np.mean([item.verdict.correct for item in of_prompt]))
    return {
        "overall": float(np.mean(list(skills.values()))),
        "standard_error": standard_error(prompt_scores),
        "skills": skills,
        "images": len(judged),
        "prompt_scores": prompt_scores,
    }


def _select(samples: ShardDataset, limit: int | None) -> list[dict[str, Any]]:
    """Return the first ``limit`` samples with skills taking turns, or all."""
    everything = [samples[index] for index in range(len(samples))]
    if limit is None:
        return everything
    skills = {sample["json"]["skill"] for sample in everything}
    quota = -(-limit // len(skills))
    taken: Counter[str] = Counter()
    chosen: list[dict[str, Any]] = []
    for sample in everything:
        skill = sample["json"]["skill"]
        if taken[skill] < quota and len(chosen) < limit:
            taken[skill] += 1
            chosen.append(sample)
    return chosen
