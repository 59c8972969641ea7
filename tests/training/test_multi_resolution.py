"""Runs over pictures of many sizes: buckets, stages and mixtures, from folders of JPEGs to the same losses in every layout."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rmoe_megatron.config.loading import load_config
from rmoe_megatron.data.shards.dataset import ShardDataset
from tests.support.commands import finish, kill, rmoe, start
from tests.support.runs import CONFIG, losses, write_shard

SIZES = [(20, 10), (10, 10), (9, 16)]
BUCKETS = ["10x6", "8x8", "6x10"]
SETTINGS = [
    "model.pos_embed_max_size=8",
    "data.buckets.multiple=2",
    "data.buckets.max_aspect_ratio=2",
    "training.steps=8",
    "training.sample_prompts=[]",
]


def jpeg(width: int, height: int, number: int) -> bytes:
    import io

    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="jpeg")
    return buffer.getvalue()


def write_set(folder: Path, count: int, first: int = 0) -> None:
    for shard in range(2):
        numbers = range(first + shard, first + count, 2)
        samples = [
            {"jpg": jpeg(*SIZES[number % 3], number), "txt": f"number {number}".encode()}
            for number in numbers
        ]
        write_shard(folder / f"{shard}.tar", samples)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizes")
    write_set(folder / "data" / "train", 30)
    write_set(folder / "data" / "val", 12, first=100)
    write_set(folder / "data" / "more", 9, first=200)
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder))
    return folder / "config.yaml"


def trained(config: Path, name: str, *settings: str, ranks: int = 1) -> Path:
    run_dir = config.parent / name
    code, errors = rmoe("train", str(config), f"run_dir={run_dir}", *SETTINGS, *settings, ranks=ranks)
    assert code == 0, errors
    return run_dir


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def assert_alike(run_dir: Path, other: Path) -> None:
    for key, tolerance in (
        ("loss", 1e-4),
        ("grad_norm", 1e-3),
        ("tokens_per_step", 0),
        ("validation_loss", 1e-4),
    ):
        expected = pytest.approx(list(losses(other, key).values()), rel=tolerance)
        assert list(losses(run_dir, key).values()) == expected, key


@pytest.fixture(scope="module")
def run(config: Path) -> Path:
    return trained(config, "one", "training.sample_every=8", "training.sample_prompts=[a red circle]")


def test_a_step_is_of_one_bucket_and_says_its_tokens(run: Path) -> None:
    tokens = {8 * (6 + width * height // 4) for width, height in ((10, 6), (8, 8))}
    assert set(losses(run, "tokens_per_step").values()) == tokens


def test_validation_and_pictures_are_of_every_bucket(run: Path) -> None:
    last = records(run)[-1]
    found = {
        key.removeprefix("validation_loss_"): value
        for key, value in last.items()
        if "validation_loss_" in key
    }
    assert set(found) == {"10x6", "8x8", "6x10"}
    assert last["validation_loss"] == pytest.approx(sum(found.values()) / 3)  # a global batch of each
    pictures = sorted(path.name for path in (run / "samples").iterdir())
    assert pictures == sorted(f"step-00000008-{bucket}.png" for bucket in BUCKETS)
    for bucket in BUCKETS:
        width, height = map(int, bucket.split("x"))
        with Image.open(run / "samples" / f"step-00000008-{bucket}.png") as image:
            assert image.width >= width
            assert image.height >= height


def test_several_ranks_train_as_one(config: Path, run: Path) -> None:
    settings = ["data.num_workers=1", "training.micro_batch_size=2"]
    assert_alike(trained(config, "two-ranks", *settings, ranks=2), run)


def test_latents_are_precomputed_in_their_buckets(config: Path, run: Path) -> None:
    for split in ("train", "val"):
        source, out = config.parent / "data" / split, config.parent / "encoded" / split
        code, errors = rmoe("data", "precompute", str(config), str(source), str(out), *SETTINGS)
        assert code == 0, errors
    folders = [
        f"data.{name}={config.parent}/encoded/{split}"
        for name, split in (("train", "train"), ("validation", "val"))
    ]
    encoded = ShardDataset(config.parent / "encoded" / "train", ["json", "txt"])
    crops = {
        sample["txt"]: sample["json"]["crop"] for sample in (encoded[index] for index in range(len(encoded)))
    }
    assert crops["number 0"] == {"left": 1, "top": 0, "width": 17, "height": 10}  # of 20 x 10, for 10 x 6
    assert crops["number 2"] == {"left": 0, "top": 0, "width": 9, "height": 15}  # of 9 x 16, for 6 x 10
    again = trained(config, "precomputed", *folders)
    assert list(losses(again).values()) == pytest.approx(list(losses(run).values()), rel=2e-3)  # float16


def test_smaller_groups_of_a_bucket_and_a_mixture(config: Path) -> None:
    mixture = f"data.mixture=[{{path: {config.parent}/data/train, weight: 1}}, {{path: {config.parent}/data/more, weight: 3}}]"
    settings = ["data.train=null", mixture, "data.buckets.batch=4", "training.log_every=1"]
    one = trained(config, "mixed", *settings)
    assert_alike(trained(config, "mixed-2", *settings, "training.micro_batch_size=2", ranks=2), one)
    # Other batches than the run's are asked of the same data.
    code, errors = rmoe("diagnose", "precision", str(config.parent / "mixed-2"), "--batches", "1")
    assert code == 0, errors
    # A global batch of two groups may be of two buckets.
    assert {8 * (6 + 15), 4 * (6 + 15) + 4 * (6 + 16)} <= set(losses(one, "tokens_per_step").values())


STAGES = "training.stages=[{steps: 3, sample_size: 4, global_batch_size: 16}, {steps: 5, sample_size: 8, micro_batch_size: 2}]"


def test_resolution_grows_in_stages_and_a_killed_run_goes_on(config: Path) -> None:
    settings = [STAGES, "checkpoint.every=2", "training.validate_every=3"]
    whole = trained(config, "staged", *settings)
    assert list(losses(whole, "samples").values()) == [16, 32, 48, 56, 64, 72, 80, 88]
    tokens = list(losses(whole, "tokens_per_step").values())
    assert {tokens[step] for step in range(3)} <= {16 * (6 + 4), 16 * (6 + 3)}
    assert {tokens[step] for step in range(3, 8)} <= {8 * (6 + 16), 8 * (6 + 15)}
    run_dir = config.parent / "staged-killed"
    for step in (2, 4):
        command = ["train", str(config), f"run_dir={run_dir}", *SETTINGS, *settings]
        process = start(command if step == 2 else ["train", "--resume", str(run_dir)])
        while not list(run_dir.glob(f"checkpoints/step-{step:08d}")):
            assert process.poll() is None, finish(process)
        kill(process)
    code, errors = rmoe("train", "--resume", str(run_dir))
    assert code == 0, errors
    for key in ("loss", "validation_loss", "samples"):
        assert losses(run_dir, key) == losses(whole, key)
    code, errors = rmoe(
        "train", "--resume", str(run_dir), "training.steps=9", STAGES.replace("steps: 3", "steps: 4")
    )
    assert code == 2
    assert "resume with the stages that it was trained with" in errors


def test_a_stage_may_have_data_of_its_own(config: Path) -> None:
    data = f"train: {config.parent}/data/more, validation: {config.parent}/data/train"
    stages = f"training.stages=[{{steps: 1, sample_size: 4}}, {{steps: 1, sample_size: 8, {data}}}]"
    run_dir = trained(config, "own-data", stages, "training.steps=2", "optimizer.warmup_steps=0")
    assert load_config(run_dir / "config.yaml", []).training.stages[1].train == f"{config.parent}/data/more"
    for draw, folder in ((0, "train"), (8, "more")):
        assert f"/data/{folder}/" in shown(run_dir, draw)


def shown(run_dir: Path, draw: int) -> str:
    from typer.testing import CliRunner

    from rmoe_megatron.cli.app import app

    result = CliRunner().invoke(app, ["data", "show", str(run_dir), "--draw", str(draw)])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (["data.buckets.multiple=3"], "sides must be multiples of 2 pixels"),
        (["data.buckets.batch=6"], "data.buckets.batch"),
        (["data.cache=/dev/null/cache"], "data.cache /dev/null/cache cannot be written"),
        (["data.buckets.sizes=[64x64]", "model.pos_embed_max_size=64"], "None of the 30 samples"),
    ],
)
def test_what_is_refused(config: Path, settings: list[str], complaint: str) -> None:
    code, errors = rmoe("train", str(config), f"run_dir={config.parent}/refused", *SETTINGS, *settings)
    assert code == 2
    assert complaint in errors
    assert "Traceback" not in errors
