"""Numbers that are not finite: left out of training, explained, never published."""

import io
import json
import math
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rmoe_megatron.checkpoint.folders import list_checkpoints
from rmoe_megatron.checkpoint.run_checkpoint import Progress, load_checkpoint, save_checkpoint
from rmoe_megatron.checkpoint.weights import RunWeights
from rmoe_megatron.config.run import CheckpointConfig
from rmoe_megatron.data.batch import TextConditions
from rmoe_megatron.data.order import GlobalOrder
from rmoe_megatron.diffusion.loss import DiffusionLoss
from rmoe_megatron.engine.protocol import StepResult
from rmoe_megatron.engine.registry import build_engine
from rmoe_megatron.errors import RunError
from rmoe_megatron.model.build import build_chunks
from rmoe_megatron.training.ema import ExponentialMovingAverage
from rmoe_megatron.training.health import Health
from rmoe_megatron.training.state import TrainingState
from tests.support.commands import rmoe
from tests.support.configurations import one_rank, tiny_config
from tests.support.runs import losses, make_run

OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]


def spoil(shard: Path, number: int, member: str = "latents.npy") -> None:
    """Put one NaN into a sample of a shard."""
    content = bytearray(shard.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        start = tar.getmember(f"{number:06d}.{member}").offset_data
    values = start + len(content[start : start + 128].partition(b"\n")[0]) + 1
    content[values : values + 2] = np.float16(np.nan).tobytes()
    shard.write_bytes(content)


def strict_json(path: Path) -> list[dict[str, float | None]]:
    def refuse(word: str) -> float:
        raise ValueError(word)

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, []),
        (2, OVERLAP),
        (2, ["engine=deepspeed", "precision=bf16"]),
        (2, ["engine=deepspeed", "deepspeed.zero_stage=2"]),
        (1, ["engine=deepspeed", "deepspeed.zero_stage=3"]),
    ],
)
def test_a_sample_that_is_not_finite_costs_its_step_and_is_named(
    tmp_path: Path, ranks: int, settings: list[str]
) -> None:
    config = make_run(tmp_path)
    spoil(tmp_path / "data" / "train" / "train-000001.tar", 5)
    code, errors = rmoe("train", str(config), "training.sample_prompts=[]", *settings, ranks=ranks)
    assert code == 0, errors
    order = GlobalOrder(32, shuffle=True, seed=0)
    expected = [draw // 8 + 1 for draw in range(160) if order[draw] == 16 + 5]
    assert len(expected) == 5  # once an epoch
    records = strict_json(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records if record.get("loss", 0) is None] == expected
    assert records[-2]["skipped_steps"] == 5
    for step in expected:
        assert f"Step {step} is left out (loss nan" in errors
    named = f"suspected: 000005 of {tmp_path}/data/train/train-000001.tar (latents).\n"
    assert errors.count(named) == 5
    assert "Traceback" not in errors
    weights = RunWeights(tmp_path / "run")
    assert all(place.read().isfinite().all() for place in weights.locations.values())
    state = json.loads((weights.checkpoint.path / "run_state.json").read_text())
    assert state["skipped_steps"] == 5


@pytest.mark.parametrize("engine", [[], ["engine=deepspeed", "deepspeed.zero_stage=3"]])
def test_skipped_steps_leave_the_weights_alone_and_too_many_end_the_run(
    tmp_path: Path, engine: list[str]
) -> None:
    config = make_run(tmp_path)
    code, errors = rmoe("train", str(config), "training.steps=5", "training.sample_prompts=[]", *engine)
    assert code == 0, errors
    for shard in (tmp_path / "data" / "train").glob("*.tar"):
        for number in range(16):
            spoil(shard, number, "text_pooled.npy")
    run_dir = tmp_path / "run"
    code, errors = rmoe(
        "train", "--resume", str(run_dir), "training.steps=20", "training.max_skipped_steps=5", "checkpoint.every=9",
        "training.validate_every=1000",
    )  # fmt: skip
    assert code == 1
    assert "Traceback" not in errors
    error = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert error == [
        "error: 5 steps in a row, up to step 10, had a loss or gradient that is not finite; the run is ended, its last "
        f"checkpoint is good, and {run_dir}/diagnosis.json says what was found."
    ]
    assert [checkpoint.step for checkpoint in list_checkpoints(run_dir)] == [9, 5]
    before, after = (RunWeights(run_dir, step, averaged=False) for step in (5, 9))
    for name, place in before.locations.items():
        assert torch.equal(place.read(), after.locations[name].read()), name
    diagnosis = json.loads((run_dir / "diagnosis.json").read_text())
    assert [record["step"] for record in diagnosis["skipped"]] == [6, 7, 8, 9, 10]
    assert {sample["what"] for sample in diagnosis["skipped"][0]["samples"]} == {"text_pooled"}
    assert diagnosis["parameters"] == []
    if engine:  # DeepSpeed has given them up
        assert diagnosis["gradients"] is None
    else:
        assert "time_text_embed.text_embedder.linear_1.weight" in diagnosis["gradients"]
    assert list(losses(run_dir)) == list(range(1, 11))


@pytest.mark.parametrize("spoilt", ["weights", "averages"])
def test_weights_that_are_not_finite_are_never_published(tmp_path: Path, spoilt: str) -> None:
    config = replace(tiny_config(), run_dir=str(tmp_path), checkpoint=CheckpointConfig(keep_last=1))
    with one_rank(config) as device:
        modules = build_chunks(config).to(device)
        null = TextConditions(torch.zeros(1, 5, 12), torch.zeros(1, 10))
        engine = build_engine(config, modules, DiffusionLoss(config, config.seed, null))
        ema = ExponentialMovingAverage(engine.parameters, 0.9)
        state = TrainingState(engine, ema, Progress(step=3))
        save_checkpoint(state, config, tmp_path)
        name, parameter = list(modules.named_parameters())[-1]
        (parameter.data if spoilt == "weights" else ema.averages[name]).view(-1)[-1] = float("inf")
        state.progress.step = 4
        with pytest.raises(RunError, match=re.escape(f"{name} on rank 0 is not finite after step 4")):
            save_checkpoint(state, config, tmp_path)
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [3]


def test_a_run_without_a_checkpoint_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    config = make_run(tmp_path)
    (tmp_path / "run" / "config.yaml").write_text(config.read_text())
    (tmp_path / "run" / "checkpoints" / "step-00000005.partial").mkdir(parents=True)
    code, errors = rmoe(
        "train", "--resume", str(tmp_path / "run"), "training.steps=3", "training.sample_prompts=[]"
    )
    assert code == 0, errors
    assert "has no checkpoint yet; it starts anew" in errors
    assert list(losses(tmp_path / "run")) == [1, 2, 3]


def test_only_steps_in_a_row_end_a_run(tmp_path: Path) -> None:
    """Of a limit of three: two bad ones, a good one and two bad ones again pass; a third in a row does not."""
    bad, good = StepResult(math.nan, 1.0, 0.1, []), StepResult(1.0, 1.0, 0.1)
    with one_rank(tiny_config()):
        health = Health(tmp_path, NoEngine(), lambda draw: {}, limit=3)  # type: ignore[arg-type]
        for step, result in enumerate((bad, bad, good, bad, bad), start=1):
            health.check(step, result)
        with pytest.raises(RunError, match="3 steps in a row, up to step 6"):
            health.check(6, bad)
    diagnosis = json.loads((tmp_path / "diagnosis.json").read_text())
    assert [record["step"] for record in diagnosis["skipped"]] == [4, 5, 6]


class NoEngine:
    parameters: dict[str, torch.Tensor] = {}  # noqa: RUF012

    def state_keys(self) -> dict[str, str]:
        return {}


def test_what_a_run_has_skipped_is_known_after_a_resume(tmp_path: Path) -> None:
    config = replace(tiny_config(), run_dir=str(tmp_path))
    progress = Progress(step=7, samples=56, skipped_steps=3, pending=["samples"])
    with one_rank(config) as device:
        modules = build_chunks(config).to(device)
        null = TextConditions(torch.zeros(1, 5, 12), torch.zeros(1, 10))
        engine = build_engine(config, modules, DiffusionLoss(config, 0, null))
        averages = ExponentialMovingAverage(engine.parameters, 0.9)
        save_checkpoint(TrainingState(engine, averages, progress), config, tmp_path)
        resumed = TrainingState(engine, averages, Progress())
        load_checkpoint(resumed, list_checkpoints(tmp_path)[0])
    assert resumed.progress == Progress(step=7, samples=56, skipped_steps=3, pending=["samples"])


def test_a_run_that_was_taken_over_publishes_nothing(tmp_path: Path) -> None:
    """The fence is asked when all is written; what was published before stays."""
    config = replace(tiny_config(), run_dir=str(tmp_path))

    def taken_over() -> None:
        assert list(tmp_path.rglob("metadata.json"))  # the checkpoint is there under its temporary name
        raise RunError("another process has taken over the run")

    with one_rank(config) as device:
        modules = build_chunks(config).to(device)
        null = TextConditions(torch.zeros(1, 5, 12), torch.zeros(1, 10))
        engine = build_engine(config, modules, DiffusionLoss(config, 0, null))
        averages = ExponentialMovingAverage(engine.parameters, 0.9)
        save_checkpoint(TrainingState(engine, averages, Progress(step=1)), config, tmp_path)
        with pytest.raises(RunError, match="taken over"):
            save_checkpoint(TrainingState(engine, averages, Progress(step=2)), config, tmp_path, taken_over)
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [1]
