"""Writes the toy shapes set as WebDataset tar shards.

Layout: ``OUT/{train,val,val_heldout}/shapes-NNNNNN.tar`` with members KEY.png, KEY.txt (caption), KEY.json (scene) and
KEY.cls (class label), and ``OUT/dataset.json``. A sample is a function of (seed, split, index) alone; the
shards are byte for byte the same each time.
"""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rmoe_megatron.data.shapes.render import render
from rmoe_megatron.data.shapes.scene import Scene, sample_scene, seen_pairs
from rmoe_megatron.data.shapes.vocabulary import COLOR_SKILLS, COLORS, HELDOUT_PAIRS, SHAPES, Pair, Skill
from rmoe_megatron.data.shards.writer import open_shard
from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic

SAMPLES_PER_SHARD = 1000
SPLITS = ("train", "val", "val_heldout")  # the position enters the random seed

# Shares of the skills in training: what needs several attributes bound at once gets more than single objects.
TRAIN_SHARES = {
    Skill.single_object: 0.06,
    Skill.two_object: 0.15,
    Skill.counting: 0.21,
    Skill.colors: 0.11,
    Skill.position: 0.24,
    Skill.color_attr: 0.23,
}


def class_label(scene: Scene) -> int:
    """Return the class of a scene for class-conditional models: color and shape of its first object, 35 classes."""
    first = scene.objects[0]
    return list(COLORS).index(first.color) * len(SHAPES) + SHAPES.index(first.shape)


def make_scene(seed: int, split: str, index: int, heldout: frozenset[Pair]) -> Scene:
    """Return sample ``index`` of a split; the validation splits go through their skills in turn."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    if split == "train":
        skill = list(TRAIN_SHARES)[rng.choice(len(TRAIN_SHARES), p=list(TRAIN_SHARES.values()))]
        return sample_scene(rng, skill, heldout, use_heldout=False)
    skills = COLOR_SKILLS if split == "val_heldout" else tuple(Skill)
    return sample_scene(rng, skills[index % len(skills)], heldout, use_heldout=split == "val_heldout")


def build_shapes(
    out: Path,
    train: int,
    val: int,
    seed: int,
    heldout: Sequence[Pair] = HELDOUT_PAIRS,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the toy set: ``train`` and ``val`` samples of seen pairs, val // 4 that name held-out pairs.

    The folder appears whole or not at all.

    Args:
        out: folder to create; it may exist if it is empty.
        heldout: (color, shape) pairs that appear in no training and no ``val`` image.
        progress: called with (samples written, samples in total) now and then.

    Returns:
        The content of ``dataset.json``.

    Raises:
        UserError: a count or the seed is out of range, a pair is unknown, or ``out`` is not empty or cannot be written.
    """
    _check_request(out, train, val, seed, heldout)
    counts = {"train": train, "val": val, "val_heldout": val // 4 if heldout else 0}
    done, total = 0, sum(counts.values())
    splits: dict[str, Any] = {}
    description = {
        "name": "shapes",
        "toy": True,
        "seed": seed,
        "splits": splits,
        "heldout_pairs": [list(pair) for pair in heldout],
    }
    with atomic.building(out) as partial:
        for split, samples in counts.items():
            (partial / split).mkdir()
            shards = []
            for start in range(0, samples, SAMPLES_PER_SHARD):
                name = f"{split}/shapes-{start // SAMPLES_PER_SHARD:06d}.tar"
                indices = range(start, min(start + SAMPLES_PER_SHARD, samples))
                _write_shard(partial / name, seed, split, indices, frozenset(heldout))
                shards.append(name)
                done += len(indices)
                if progress is not None:
                    progress(done, total)
            splits[split] = {"samples": samples, "shards": shards}
        (partial / "dataset.json").write_text(json.dumps(description, indent=1) + "\n")
    return description


def _check_request(out: Path, train: int, val: int, seed: int, heldout: Sequence[Pair]) -> None:
    if train < 1 or val < 0 or not 0 <= seed < 1 << 63:
        raise UserError(
            f"train={train}, val={val} and seed={seed} are not possible; give train 1 or more, val 0 or more and a "
            "seed from 0 to 2**63 - 1."
        )
    for color, shape in heldout:
        if color not in COLORS or shape not in SHAPES:
            raise UserError(
                f"The held-out pair ({color}, {shape}) is unknown; use colors {', '.join(COLORS)} and shapes "
                f"{', '.join(SHAPES)}."
            )
    seen = seen_pairs(frozenset(heldout))
    if {shape for _, shape in seen} != set(SHAPES) or {color for color, _ in seen} != set(COLORS):
        raise UserError("The held-out pairs leave a shape or color out of training; hold out fewer pairs.")
    atomic.require_empty(out, "The output")


def _write_shard(path: Path, seed: int, split: str, indices: range, heldout: frozenset[Pair]) -> None:
    with open_shard(path) as write:
        for index in indices:
            scene = make_scene(seed, split, index, heldout)
            png = io.BytesIO()
            Image.fromarray(render(scene.objects)).save(png, format="png")
            members = {
                "png": png.getvalue(),
                "txt": scene.caption,
                "json": scene.to_json(),
                "cls": class_label(scene),
            }
            write(f"{split}-{index:08d}", members)
