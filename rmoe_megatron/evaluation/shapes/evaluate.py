"""The toy shapes benchmark: images for the validation prompts, detected, judged and summed up."""

from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rmoe_megatron.data.shapes.vocabulary import Skill
from rmoe_megatron.data.shards import ShardDataset
from rmoe_megatron.evaluation.fingerprints import file_digest
from rmoe_megatron.evaluation.provenance import digest
from rmoe_megatron.evaluation.results import prompt_key
from rmoe_megatron.evaluation.shapes.detector import detect, matches_scene
from rmoe_megatron.evaluation.shapes.report import JudgedImage, write_report
from rmoe_megatron.evaluation.shapes.rules import judge

SPLITS = {"seen": "val", "heldout": "val_heldout"}
CHUNK = 512  # images between two reports of progress

Generate = Callable[[list[str], list[int]], NDArray[np.uint8]]


def evaluate_shapes(
    generate: Generate,
    data: Path,
    out: Path,
    sampling: dict[str, Any],
    images_per_prompt: int = 4,
    limit: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score a model and write ``results.json``, ``results.md`` and ``examples.png`` to ``out``.

    Args:
        generate: from prompts and seeds to images uint8 [N, H, W, 3]; an image depends on its own seed only.
        data: folder of the toy set.
        sampling: how ``generate`` makes images; copied into the results.
        limit: prompts per split, spread evenly over the skills; None takes all.
        progress: called with (images done, images in total).

    Raises:
        UserError: the validation shards are missing.
    """
    judged: list[JudgedImage] = []
    detector_right = detector_total = 0
    scenes = {
        split: _select(ShardDataset(data / folder, ["png", "json"]), limit)
        for split, folder in SPLITS.items()
        if split == "seen" or any((data / folder).glob("*.tar"))  # a set may hold out nothing
    }
    total = sum(len(part) for part in scenes.values()) * images_per_prompt
    if progress is not None:
        progress(0, total)
    for split_number, (split, part) in enumerate(scenes.items()):
        for sample in part:
            objects = [(item["shape"], item["color"]) for item in sample["json"]["objects"]]
            detector_right += matches_scene(detect(sample["png"].transpose(1, 2, 0)), objects)
            detector_total += 1
        requests = [
            (sample["json"], _image_seed(seed, split_number, prompt, image))
            for prompt, sample in enumerate(part)
            for image in range(images_per_prompt)
        ]
        for start in range(0, len(requests), CHUNK):
            chunk = requests[start : start + CHUNK]
            images = generate(
                [scene["caption"] for scene, _ in chunk], [image_seed for _, image_seed in chunk]
            )
            for (scene, _), image in zip(chunk, images, strict=True):
                verdict = judge(detect(image), scene["requirements"])
                judged.append(JudgedImage(split, scene["skill"], scene["caption"], image, verdict))
            if progress is not None:
                progress(len(judged), total)
    results = {
        "benchmark": "toy shapes",
        **sampling,
        "images_per_prompt": images_per_prompt,
        "seed": seed,
        "detector_accuracy_on_ground_truth": detector_right / detector_total,
        "splits": {
            split: score([item for item in judged if item.split == split], images_per_prompt)
            for split in scenes
        },
    }
    write_report(results, judged, out)
    return results


def set_record(data: Path) -> dict[str, str]:
    """Return a digest of the shards of every split, as part of what an evaluation is of."""
    return {
        split: digest([file_digest(shard) for shard in sorted((data / folder).glob("*.tar"))])
        for split, folder in SPLITS.items()
    }


def score(judged: list[JudgedImage], images_per_prompt: int = 1) -> dict[str, Any]:
    """Return the share of right images per skill and their mean over skills, as GenEval defines them, with its standard error.

    The error says how far the mean would move with other prompts of the same skills and other noise: images of a prompt are right
    or wrong together, so a prompt counts as one observation. None where a skill has a single prompt.

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
    error = None
    if min(map(len, prompt_scores.values())) > 1:
        shares = [list(of_skill.values()) for of_skill in prompt_scores.values()]
        error = float(np.sqrt(sum(np.var(each, ddof=1) / len(each) for each in shares))) / len(shares)
    return {
        "overall": float(np.mean(list(skills.values()))),
        "standard_error": error,
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


def _image_seed(seed: int, split: int, prompt: int, image: int) -> int:
    """Return a seed of its own for every image."""
    return int(np.random.SeedSequence([seed, split, prompt, image]).generate_state(1)[0])
