"""Flips and random crops of raw samples: every part as likely as any other, and a function of seed and draw alone."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rmoe_megatron.config.buckets import Bucket
from rmoe_megatron.config.loading import load_config
from rmoe_megatron.config.run import AugmentConfig
from rmoe_megatron.counter_rng import Purpose
from rmoe_megatron.data.loader import BatchLayout, batches
from rmoe_megatron.data.shards.bucketing import Bucketing
from rmoe_megatron.data.training_dataset import SampleFormat, TrainingDataset
from rmoe_megatron.errors import UserError
from rmoe_megatron.input_pipeline.draws import open_draws
from rmoe_megatron.precompute.job import check_precompute
from rmoe_megatron.training import run
from tests.support.runs import losses, make_run, write_shard

SIDE, LONG = 4, 12
BOTH = AugmentConfig(flips=True, crops=True)


def columns(width: int, height: int) -> bytes:
    """A picture whose column or row number is its brightness: 0, 10, 20, ..."""
    longer = np.arange(max(width, height), dtype=np.uint8) * 10
    values = np.broadcast_to(longer[None, :] if width > height else longer[:, None], (height, width))
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(values)).convert("RGB").save(buffer, format="png")
    return buffer.getvalue()


def open_set(
    folder: Path, augment: AugmentConfig, seed: int = 0, width: int = LONG, height: int = SIDE
) -> TrainingDataset:
    if not folder.exists():
        write_shard(folder / "a.tar", [{"png": columns(width, height), "txt": b"columns"}] * 8)
    square = Bucketing((Bucket(SIDE, SIDE),), upscale=False)
    return TrainingDataset(folder, SampleFormat(bucketing=square, seed=seed, augment=augment))


def seen(samples: TrainingDataset, draw: int) -> tuple[int, bool]:
    """Where the part begins that a draw sees, and whether it is mirrored."""
    image = samples.draw(0, draw)["image"].numpy().astype(int) // 10
    line = image[0, 0] if (image[0, 0] != image[0, 0, 0]).any() else image[0, :, 0]
    flipped = bool(line[0] > line[-1]) and (image[0, 0] != image[0, 0, 0]).any()
    first = int(min(line))
    assert sorted(line) == list(range(first, first + SIDE))  # neighbours, not resampled
    return first, bool(flipped)


def test_every_part_and_either_side_is_as_likely(tmp_path: Path) -> None:
    """900 draws of nine places: 100 each with a standard deviation of 9.4; 450 flips with one of 15."""
    samples = open_set(tmp_path / "set", BOTH)
    found = [seen(samples, draw) for draw in range(900)]
    places = Counter(first for first, _ in found)
    assert sorted(places) == list(range(LONG - SIDE + 1))
    assert all(60 < count < 140 for count in places.values()), places
    assert 390 < sum(flipped for _, flipped in found) < 510
    # Which side is drawn says nothing of the place: 200 are mirrored and begin in one of the first four, with a deviation of 12.5.
    assert 150 < sum(flipped and first < 4 for first, flipped in found) < 250


@pytest.mark.parametrize(
    ("augment", "places", "sides"),
    [
        (AugmentConfig(), {4}, {False}),
        (AugmentConfig(flips=True), {4}, {False, True}),
        (AugmentConfig(crops=True), set(range(9)), {False}),
    ],
)
def test_what_is_not_asked_for_stays(
    tmp_path: Path, augment: AugmentConfig, places: set[int], sides: set[bool]
) -> None:
    samples = open_set(tmp_path / "set", augment)
    found = [seen(samples, draw) for draw in range(100)]
    assert {first for first, _ in found} == places
    assert {flipped for _, flipped in found} == sides


def test_a_tall_picture_is_cut_along_its_height_and_mirrored_along_its_width(tmp_path: Path) -> None:
    samples = open_set(tmp_path / "set", BOTH, width=SIDE, height=LONG)
    assert {seen(samples, draw)[0] for draw in range(200)} == set(range(9))
    for draw in range(20):  # rows stay in their order
        image = samples.draw(0, draw)["image"].numpy().astype(int)
        assert (np.diff(image[0, :, 0]) == 10).all()


def test_a_draw_is_the_same_whoever_makes_it_and_another_of_another_seed(tmp_path: Path) -> None:
    first, again = open_set(tmp_path / "set", BOTH), open_set(tmp_path / "set", BOTH)
    expected = [seen(first, draw) for draw in range(40)]
    assert [seen(again, draw) for draw in reversed(range(40))] == expected[::-1]
    assert [seen(open_set(tmp_path / "set", BOTH, seed=1), draw) for draw in range(40)] != expected


def test_ranks_and_workers_see_what_one_process_sees(tmp_path: Path) -> None:
    samples = open_set(tmp_path / "set", BOTH)

    def images(layout: BatchLayout, num_workers: int = 0) -> dict[int, Any]:
        loaded = batches(samples, range(8), layout, last_draw=8, num_workers=num_workers)
        return {
            draw: image.tolist()
            for batch in loaded
            for draw, image in zip(batch["draw_index"].tolist(), batch["image"], strict=True)
        }

    whole = images(BatchLayout(8, 4, 0, 1))
    assert len({str(image) for image in whole.values()}) > 3
    assert images(BatchLayout(8, 2, 0, 2)) | images(BatchLayout(8, 2, 1, 2)) == whole
    assert images(BatchLayout(8, 4, 0, 1), num_workers=1) == whole


def raw_run(folder: Path, *overrides: str) -> Path:
    """A configuration that trains on pictures of 12 x 8 pixels."""
    config = make_run(folder)
    for split in ("train", "val"):
        pictures = [{"png": columns(12, 8), "txt": f"picture {number}".encode()} for number in range(16)]
        write_shard(folder / "raw" / split / "a.tar", pictures)
    return config


SETTINGS = [
    "data.augment.flips=true",
    "data.augment.crops=true",
    "training.sample_prompts=[]",
    "optimizer.lr_decay_style=constant",
]


def test_a_resumed_run_goes_on_with_the_same_views_and_validation_is_left_alone(tmp_path: Path) -> None:
    config = raw_run(tmp_path)
    raw = [f"data.train={tmp_path}/raw/train", f"data.validation={tmp_path}/raw/val"]

    def settings(name: str, *more: str) -> list[str]:
        return [
            *raw,
            f"run_dir={tmp_path}/{name}",
            "training.steps=4",
            "optimizer.warmup_steps=1",
            *SETTINGS,
            *more,
        ]

    run.train(load_config(config, settings("whole")))
    run.train(load_config(config, settings("halves", "training.steps=2")))
    run.resume(tmp_path / "halves", ["training.steps=4"])
    run.train(load_config(config, settings("plain", "data.augment.flips=false", "data.augment.crops=false")))
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    assert losses(tmp_path / "plain") != losses(tmp_path / "whole")
    (draws,) = open_draws(load_config(config, settings("whole")))
    assert draws.validation is not None
    views = {draws.validation.draw(0, draw)["image"].numpy().tobytes() for draw in range(20)}
    assert len(views) == 1


def test_precomputed_samples_are_refused_with_it(tmp_path: Path) -> None:
    config = raw_run(tmp_path)
    with pytest.raises(
        UserError, match=f"{tmp_path}/data/train holds precomputed samples, whose pictures data.augment"
    ):
        open_draws(load_config(config, SETTINGS))
    with pytest.raises(UserError, match="data.augment changes raw samples in every draw of training"):
        check_precompute(load_config(config, SETTINGS), tmp_path / "raw", tmp_path / "out")


def test_no_two_purposes_share_a_stream() -> None:
    assert len({int(purpose) for purpose in Purpose.__members__.values()}) == len(Purpose.__members__)
