"""Samples that cannot be used: each is named, the same one takes its place in every layout, too many end the run."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from rmoe_megatron.data.order import GlobalOrder
from tests.support.commands import rmoe
from tests.support.runs import losses, make_run


def bad_samples(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "bad_samples.jsonl").read_text().splitlines()]


def cut(shard: Path, number: int) -> None:
    """Spoil the magic number of a sample's array, so that it cannot be decoded."""
    content = bytearray(shard.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        start = tar.getmember(f"{number:06d}.latents.npy").offset_data
    content[start : start + 6] = b"\0NUMPY"
    shard.write_bytes(content)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = make_run(tmp_path)
    for number in (3, 9):
        cut(tmp_path / "data" / "train" / "train-000001.tar", number)
    return path


SHORT = ["training.sample_prompts=[]", "training.steps=8", "data.max_bad_fraction=0.2"]


def test_each_is_named_and_replaced_alike_in_every_layout(tmp_path: Path, config: Path) -> None:
    order = GlobalOrder(32, shuffle=True, seed=0)
    drawn = [(draw, order[draw] - 16) for draw in range(64) if order[draw] in (16 + 3, 16 + 9)]
    assert len(drawn) == 4
    found = []
    layouts = ([1], [2], [2, "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"])
    for number, (ranks, *layout) in enumerate(layouts):
        run_dir = tmp_path / f"run{number}"
        code, errors = rmoe(
            "train", str(config), f"run_dir={run_dir}", *SHORT, *map(str, layout), ranks=int(ranks)
        )
        assert code == 0, errors
        named = sorted(bad_samples(run_dir), key=lambda each: int(each["draw"]))
        assert [(each["draw"], each["key"]) for each in named] == [
            (draw, f"{number:06d}") for draw, number in drawn
        ]
        assert {each["shard"] for each in named} == {f"{tmp_path}/data/train/train-000001.tar"}
        assert "latents.npy" in named[0]["reason"]
        assert losses(run_dir, "bad_samples")[8] == 4
        assert all(seconds > 0 for seconds in losses(run_dir, "data_wait_seconds").values())
        found.append(list(losses(run_dir).values()))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)


def test_those_of_the_validation_are_told(tmp_path: Path, config: Path) -> None:
    cut(tmp_path / "data" / "val" / "val-000000.tar", 2)
    settings = [
        "training.sample_prompts=[]",
        "training.steps=1",
        "optimizer.warmup_steps=0",
        "data.max_bad_fraction=0",
    ]
    code, errors = rmoe("train", str(config), *settings)
    assert code == 0, errors
    assert f"Sample 000002 of {tmp_path}/data/val/val-000000.tar cannot be used" in errors


def test_the_first_ends_a_run_that_asks_for_it(tmp_path: Path, config: Path) -> None:
    code, errors = rmoe("train", str(config), *SHORT, "data.bad_samples=stop", "data.num_workers=1")
    assert code == 2, errors
    first = bad_samples(tmp_path / "run")[0]
    last = errors.splitlines()[-1]
    assert last.startswith(f"error: Sample {first['key']} of {first['shard']} cannot be used (latents.npy: ")
    assert last.endswith("remove it, or set data.bad_samples=skip to have the next one take its place.")


def test_too_many_end_the_run(tmp_path: Path, config: Path) -> None:
    for number in range(16):
        cut(tmp_path / "data" / "train" / "train-000000.tar", number)
    code, errors = rmoe("train", str(config), *SHORT)
    assert code == 2, errors
    assert "more than data.max_bad_fraction (0.2) allows" in errors.splitlines()[-1]
    assert len(bad_samples(tmp_path / "run")) > 8
