"""Which bucket a sample is of, and that every sample is found in its own and counted where it is left out."""

import logging
import math
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmoe_megatron.config.buckets import Bucket
from rmoe_megatron.data.shards.bucketing import NO_BUCKET, TOO_SMALL, BucketCounts, Bucketing
from rmoe_megatron.data.shards.decoding import View
from rmoe_megatron.data.shards.index import BLOCK, NO_PIECES, RECORD, Index, IndexedShard, Kind
from rmoe_megatron.data.training_dataset import SampleFormat, TrainingDataset
from rmoe_megatron.errors import UserError
from tests.data.test_index import picture
from tests.support.runs import array, write_shard

BUCKETS = tuple(Bucket(*size) for size in ((96, 32), (64, 32), (32, 32), (64, 64), (32, 64)))


@settings(deadline=None)
@given(width=st.integers(0, 200), height=st.integers(0, 200), upscale=st.booleans())
def test_a_picture_comes_into_the_bucket_of_the_nearest_shape(width: int, height: int, upscale: bool) -> None:
    found = Bucketing(BUCKETS, upscale).of(width, height)
    if not width or not height:
        assert found == NO_BUCKET
        return
    distance = [abs(math.log(width * bucket.height / (height * bucket.width))) for bucket in BUCKETS]
    nearest = [place for place, each in enumerate(distance) if each <= min(distance) + 1e-9]
    fitting = [
        place for place in nearest if width >= BUCKETS[place].width and height >= BUCKETS[place].height
    ]
    if not fitting and not upscale:
        assert found == TOO_SMALL
    elif len({BUCKETS[place].aspect_ratio for place in nearest}) == 1:  # else it is between two shapes
        assert found == (fitting[-1] if fitting else nearest[0])


@settings(deadline=None)
@given(width=st.integers(1, 20_000), height=st.integers(1, 20_000), bucket=st.sampled_from(BUCKETS))
def test_the_largest_part_of_the_middle_is_kept(width: int, height: int, bucket: Bucket) -> None:
    crop = View().crop(width, height, bucket)
    assert crop.width == width or crop.height == height
    assert 0 <= crop.left <= crop.left + crop.width <= width
    assert 0 <= crop.top <= crop.top + crop.height <= height
    assert abs(width - crop.width - 2 * crop.left) <= 1
    assert abs(height - crop.height - 2 * crop.top) <= 1
    # Of the bucket's shape to the nearest pixel.
    other = Fraction(bucket.width, bucket.height)
    assert abs(crop.width - crop.height * other) <= max(1, other) or min(crop.width, crop.height) == 1


def test_every_record_is_counted_and_found(tmp_path: Path) -> None:
    """Against going through all records, over several blocks; also when the counts come from their file."""
    generator = np.random.default_rng(0)
    records = np.zeros(3 * BLOCK + 7, RECORD)
    records["width"] = generator.integers(0, 120, len(records))
    records["height"] = generator.integers(0, 120, len(records))
    records["kind"] = generator.integers(0, 2, len(records))
    counts = [
        np.bincount(records["kind"][start : start + BLOCK], minlength=2)
        for start in range(0, len(records), BLOCK)
    ]
    kinds = [
        Kind(["jpg", "txt"], int((records["kind"] == 0).sum())),
        Kind(["jpg"], int((records["kind"] == 1).sum())),
    ]
    shard = IndexedShard("a.tar", 1, 1, len(records), "")
    index = Index(tmp_path, [shard], kinds, records, np.array(counts, "<u2"), NO_PIECES)
    bucketing = Bucketing(BUCKETS)
    expected: dict[int, list[int]] = {number: [] for number in range(-2, len(BUCKETS))}
    for place, record in enumerate(records):
        if record["kind"] == 0:
            expected[bucketing.of(int(record["width"]), int(record["height"]))].append(place)
    for _ in range(2):
        found = BucketCounts(index, lambda members: "txt" in members, bucketing, [tmp_path / "index"])
        assert (found.too_small, found.in_none) == (len(expected[TOO_SMALL]), len(expected[NO_BUCKET]))
        for number, selection in enumerate(found.selections()):
            assert [selection[place] for place in range(len(selection))] == expected[number]
    written = list(tmp_path.iterdir())
    assert len(written) == 1
    content = written[0].read_bytes()
    for damaged in (b"", content[:40], b"\0" * len(content)):
        written[0].write_bytes(damaged)
        assert BucketCounts(
            index, lambda members: "txt" in members, bucketing, [tmp_path / "index"]
        ).too_small == len(expected[TOO_SMALL])
        assert written[0].read_bytes() == content
    # Other kinds, and another index, have other counts.
    assert BucketCounts(index, lambda members: True, bucketing, [tmp_path / "index"]).too_small > len(
        expected[TOO_SMALL]
    )


def write_raw(folder: Path, sizes: list[tuple[int, int]], shards: int = 2) -> None:
    for shard in range(shards):
        mine = sizes[shard::shards]
        samples = [{"jpg": picture(*size), "txt": f"{size[0]}x{size[1]}".encode()} for size in mine]
        write_shard(folder / f"{shard}.tar", samples)


def divided(folder: Path, *buckets: Bucket, upscale: bool = False, **changes: Any) -> TrainingDataset:
    return TrainingDataset(
        folder, SampleFormat(bucketing=Bucketing(buckets, upscale), divides=True, **changes)
    )


def test_samples_are_numbered_by_bucket_and_cut_to_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_raw(tmp_path, [(64, 32), (40, 40), (33, 70), (32, 32), (20, 20), (100, 41)])
    write_shard(tmp_path / "2.tar", [{"jpg": b"no picture", "txt": b"none"}])
    with caplog.at_level(logging.WARNING):
        dataset = divided(tmp_path, Bucket(48, 24), Bucket(32, 32), Bucket(24, 48))
    assert dataset.sizes == [2, 2, 1]
    drawn = [dataset.draw(index, 0) for index in range(len(dataset))]
    assert [sample["caption"] for sample in drawn] == ["64x32", "100x41", "40x40", "32x32", "33x70"]
    assert [tuple(sample["image"].shape) for sample in drawn] == [(3, 24, 48)] * 2 + [(3, 32, 32)] * 2 + [
        (3, 48, 24)
    ]
    assert "1 are smaller than their bucket" in caplog.text
    assert "1 are of no size that can be told" in caplog.text
    enlarged = divided(tmp_path, Bucket(48, 24), Bucket(32, 32), Bucket(24, 48), upscale=True)
    assert enlarged.sizes == [2, 3, 1]


def test_the_next_sample_of_the_bucket_takes_the_place_of_a_bad_one(tmp_path: Path) -> None:
    write_raw(tmp_path, [(64, 32), (40, 40), (62, 32), (44, 44)], shards=1)
    content = bytearray((tmp_path / "0.tar").read_bytes())
    stamp = (tmp_path / "0.tar").stat()
    dataset = divided(tmp_path, Bucket(48, 24), Bucket(32, 32))
    first = content.find(b"\xff\xd8", content.find(b"000002.jpg"))
    content[first + 100 : first + 200] = bytes(100)  # the last of the first bucket: its headers are whole
    (tmp_path / "0.tar").write_bytes(content)
    os.utime(tmp_path / "0.tar", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    bad: list[Any] = []
    assert dataset.draw(1, 5, bad)["caption"] == "64x32"
    assert [(each.key, each.draw) for each in bad] == [("000002", 5)]


def test_no_sample_in_any_bucket(tmp_path: Path) -> None:
    write_raw(tmp_path, [(20, 20), (10, 10)])
    with pytest.raises(UserError, match="None of the 2 samples .* 2 are smaller than their bucket"):
        divided(tmp_path, Bucket(32, 32))


def test_latents_have_the_size_of_a_bucket_or_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shapes = [(4, 3, 6), (4, 4, 4), (4, 3, 6), (4, 5, 5)]
    samples = [{"latents.npy": array(np.zeros(shape)), "cls": b"1"} for shape in shapes]
    write_shard(tmp_path / "0.tar", samples)
    with caplog.at_level(logging.WARNING):
        dataset = divided(tmp_path, Bucket(48, 24), Bucket(32, 32), num_classes=3, pixels_per_latent=8)
    assert dataset.sizes == [2, 1]
    assert tuple(dataset.draw(2, 0)["latents"].shape) == (4, 4, 4)
    assert "1 are precomputed in none of the sizes" in caplog.text
