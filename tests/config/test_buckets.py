"""Which sizes ``data.buckets`` makes, and what of buckets, stages and mixtures is refused."""

from dataclasses import replace
from itertools import product

import pytest

from rmoe_megatron.config.buckets import Bucket, build_buckets
from rmoe_megatron.config.run import (
    BucketsConfig,
    DataConfig,
    MixedDatasetConfig,
    ParallelConfig,
    RunConfig,
    StageConfig,
    TrainingConfig,
)
from rmoe_megatron.config.stages import stage_at, stage_of_draw, stages_of
from rmoe_megatron.config.validation import validate
from rmoe_megatron.errors import UserError
from rmoe_megatron.training.preflight import check_buckets
from tests.support.configurations import tiny_config
from tests.support.ranks import DIT


@pytest.mark.parametrize(
    ("side", "multiple", "ratio"), [(1024, 64, 2.0), (512, 64, 4.0), (32, 8, 2.0), (256, 32, 1.0)]
)
def test_generated_buckets_are_the_largest_within_the_pixels(side: int, multiple: int, ratio: float) -> None:
    found = build_buckets(BucketsConfig(multiple=multiple, max_aspect_ratio=ratio), side)
    sides = range(multiple, 2 * side * side // multiple, multiple)
    longest = [each for each in sides if each >= side]
    expected = set()
    for longer in longest:
        shorter = max((each for each in sides if each * longer <= side * side), default=0)
        if shorter and longer / shorter <= ratio:
            expected |= {(longer, shorter), (shorter, longer)}
    assert {(bucket.width, bucket.height) for bucket in found} == expected
    assert Bucket(side, side) in found
    assert list(found) == sorted(found, key=lambda bucket: -bucket.width / bucket.height)


def test_buckets_of_sdxl_s_size() -> None:
    found = build_buckets(BucketsConfig(), 1024)
    assert {"1024x1024", "1152x896", "1216x832", "1344x768", "768x1344"} <= set(map(str, found))
    assert all(bucket.width * bucket.height <= 1024**2 for bucket in found)


def test_a_list_of_sizes() -> None:
    found = build_buckets(BucketsConfig(sizes=["256x256", "512x512", "512x256"]), 512)
    assert list(map(str, found)) == ["512x256", "256x256", "512x512"]


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        (["512"], "'512'; write WIDTHxHEIGHT"),
        (["0x64"], "'0x64'"),
        (["64x64", "64x64"], "64x64 twice"),
        (["64 x 64"], "write WIDTHxHEIGHT"),
    ],
)
def test_what_is_no_list_of_sizes(sizes: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        build_buckets(BucketsConfig(sizes=sizes), 512)


def test_there_are_neither_none_nor_hundreds() -> None:
    with pytest.raises(UserError, match="makes 0 buckets of 32 x 32"):
        build_buckets(BucketsConfig(multiple=64), 32)
    with pytest.raises(UserError, match="between 1 and 64"):
        build_buckets(BucketsConfig(multiple=8, max_aspect_ratio=16), 1024)


def staged(*stages: StageConfig, **changes: object) -> RunConfig:
    config = tiny_config(**changes)
    steps = sum(stage.steps for stage in stages)
    return replace(config, training=replace(config.training, steps=steps, stages=list(stages)))


def test_stages_come_one_after_the_other() -> None:
    stages = stages_of(staged(StageConfig(5, 4, global_batch_size=16), StageConfig(7, 8, 2, train="other")))
    assert [(stage.first_step, stage.end_step, stage.first_draw) for stage in stages] == [
        (0, 5, 0),
        (5, 12, 80),
    ]
    assert [(stage.micro_batch_size, stage.global_batch_size) for stage in stages] == [(4, 16), (2, 8)]
    assert [stage.datasets[0].path for stage in stages] == ["unused", "other"]
    assert [stage_at(stages, step).number for step in (0, 4, 5, 11, 12)] == [0, 0, 1, 1, 1]
    assert [stage_of_draw(stages, draw).number for draw in (0, 79, 80, 1000)] == [0, 0, 1, 1]
    for step, draw in product((5, 9), repeat=2):
        assert (stages[1].draws(step) == 80 + (draw - 5) * 8) == (step == draw)


BUCKETS = BucketsConfig(multiple=2)
MIXTURE = [MixedDatasetConfig("a", weight=1.0), MixedDatasetConfig("b", epochs=2.0)]


@pytest.mark.parametrize(
    ("config", "world_size", "complaint"),
    [
        (staged(StageConfig(5, 4), StageConfig(5, 3)), 1, r"training.stages\[1\].sample_size \(3\) is not divisible"),
        (staged(StageConfig(5, 64)), 1, r"stages\[0\].sample_size \(64\) is more than model.pos_embed_max_size"),
        (replace(staged(StageConfig(5, 4)), training=replace(tiny_config().training, stages=[StageConfig(5, 4)])), 1,
         "training.stages take 5 steps, but training.steps is 20"),
        (staged(StageConfig(5, 4, global_batch_size=6)), 1, r"training.stages\[0\].global_batch_size \(6\)"),
        (staged(StageConfig(20, 8), model=DIT, recurrence=None), 1, "training.stages are for an MM-DiT"),
        (tiny_config(model=DIT, recurrence=None, data=DataConfig("x", buckets=BUCKETS)), 1, "data.buckets is for an MM-DiT"),
        (tiny_config(data=DataConfig("x", buckets=BucketsConfig(batch=6))), 1, "data.buckets.batch"),
        (tiny_config(data=DataConfig("x", buckets=BucketsConfig(batch=16))), 1, "data.buckets.batch"),
        (tiny_config(None, data=DataConfig("x", buckets=BucketsConfig(batch=4)),
                     parallel=ParallelConfig(pipeline_model_parallel_size=3)), 3, "for data parallelism alone"),
        (tiny_config(data=DataConfig("x", buckets=BucketsConfig(batch=4)),
                     parallel=ParallelConfig(context_parallel_size=2)), 2, "for data parallelism alone"),
        (tiny_config(data=DataConfig("x", buckets=BucketsConfig(batch=4)), training=TrainingConfig(
            steps=5, micro_batch_size=1, global_batch_size=8), parallel=ParallelConfig(expert_model_parallel_size=2)), 2,
         "for data parallelism alone"),
        (tiny_config(data=DataConfig()), 1, "one of data.train and data.mixture"),
        (tiny_config(data=DataConfig("x", mixture=MIXTURE)), 1, "one of data.train and data.mixture"),
        (tiny_config(data=DataConfig(mixture=MIXTURE)), 1, "needs a weight, or every entry epochs"),
        (tiny_config(data=DataConfig(mixture=[MixedDatasetConfig("a")])), 1, "needs a weight, or every entry epochs"),
        (tiny_config(data=DataConfig(mixture=[MixedDatasetConfig("a", 1.0, 1.0)])), 1, "needs a weight"),
        (staged(StageConfig(5, 4), StageConfig(5, 8), data=DataConfig("x", buckets=BucketsConfig(sizes=["8x8"]))), 1,
         "those of one resolution"),
    ],
)  # fmt: skip
def test_what_is_refused(config: RunConfig, world_size: int, complaint: str) -> None:
    config.optimizer.warmup_steps = 0
    with pytest.raises(UserError, match=complaint):
        validate(config, world_size)


@pytest.mark.parametrize(
    ("buckets", "changes", "complaint"),
    [
        (BucketsConfig(sizes=["7x8"]), {}, "7x8, whose sides must be multiples of 2 pixels"),
        (BucketsConfig(sizes=["16x4"]), {}, r"16x4, which is 8 x 2 patches; model.pos_embed_max_size \(4\)"),
        (BucketsConfig(sizes=["8x8", "6x6"]), {"parallel": ParallelConfig(context_parallel_size=2)}, "9 patches cannot be spread"),
    ],
)  # fmt: skip
def test_buckets_that_do_not_fit_the_model(
    buckets: BucketsConfig, changes: dict[str, object], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        check_buckets(tiny_config(data=DataConfig("x", buckets=buckets), **changes))
