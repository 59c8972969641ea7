"""``rmoe plan`` as it is typed."""

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from rmoe_megatron.planning.costs import Storage
from rmoe_megatron.planning.dry_run import RankUsage
from rmoe_megatron.planning.hardware import HARDWARE
from rmoe_megatron.planning.plan import Plan
from rmoe_megatron.planning.report import describe
from rmoe_megatron.planning.step_time import StepTime
from tests.support.commands import rmoe
from tests.support.configurations import tiny_config
from tests.support.ranks import layout

TINY = ["configs/shapes_tiny.yaml", "precision=bf16", "training.micro_batch_size=16", "data.train=nowhere"]


def test_a_plan_is_written_down_and_drawn(tmp_path: Path) -> None:
    json_file, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    code, errors = rmoe("plan", *TINY, "--gpus", "4", "--json", str(json_file), "--picture", str(picture))
    assert code == 0, errors
    figures = json.loads(json_file.read_text())
    assert figures["layout"] == {
        "tensor": 1, "pipeline": 1, "context": 1, "expert": 1, "data": 4, "micro_batch_size": 16, "global_batch_size": 64,
        "recompute": "none",
    }  # fmt: skip
    (stage,) = figures["stages"]
    assert stage["peak"] == sum(
        stage[kind] for kind in ("parameters", "gradients", "optimizer", "averages", "activations")
    )
    assert sum(each["bytes"] for each in stage["at_peak"]) == stage["activations"]
    assert {each["part"] for each in stage["at_peak"]} >= {"block 0", "block 1", "block 2"}
    computed = sum(each["seconds"] for each in stage["operations"])
    assert computed == pytest.approx(
        sum(figures["seconds"][kind] for kind in ("products", "attention", "element_wise"))
    )
    # The output layer: 16 patches a picture of 192 values each become 8 x 8 x 3 ones.
    assert any(each["shapes"] == "192 256x192 192x192" for each in stage["operations"])
    # Latents of 3 x 32 x 32, 16 tokens of 384 values and 384 pooled ones, two bytes each.
    assert figures["data_bytes_per_second"] / figures["samples_per_second"] == pytest.approx(2 * 9600)
    assert sum(figures["seconds"].values()) == pytest.approx(2 * figures["seconds"]["total"])
    assert Image.open(picture).size == (2160, 540)


def stage(peak: int) -> RankUsage:
    return RankUsage(
        0, parameters=peak, gradients=0, averages=0, optimizer=0, activations=0, operations=Counter(), collectives=Counter(),
        micro_batches=2,
    )  # fmt: skip


def test_a_plan_is_told() -> None:
    """Two stages of 73.7 and 10 GB on H100, of whose 80 GB 73.6 can be used; 8 samples in half a second on two GPUs."""
    config = tiny_config(None, parallel=layout(pp=2))
    seconds = StepTime(products=0.2, attention=0.1, element_wise=0.1, bubble=0.1)
    plan = Plan(config, HARDWARE["h100"], 2, [stage(73_700_000_000), stage(10_000_000_000)], seconds)
    text = describe(plan, Storage(1000, 50_000_000_000), samples=1_152_000, price=2.5)
    assert (
        "2 x H100 80 GB: tensor 1, pipeline 2, context 1, expert 1, data 1; micro-batch 4, 2 of them a step"
        in text
    )
    assert "It does not fit: 73.7 GB of tensors at the fullest moment, and 73.6 of 80 GB can be used." in text
    assert "500.0 ms  16 samples/s" in text
    # 1,152,000 samples take 72,000 s, which are 20 hours of two GPUs.
    assert "40 GPU-hours, 0.8 days, 100 at 2.5 an hour" in text
    assert "Data: 0.0 MB/s of latents and embeddings, 1.0 kB a sample." in text
    # 50 GB at 10 GB/s take 5 s, and 500 steps of half a second 250 s.
    assert (
        "Checkpoint: 50.0 GB, 5.0 s at an assumed 10 GB/s; one every 500 steps takes 1.96% of the time."
        in text
    )
    fitting = Plan(config, HARDWARE["h100"], 2, [stage(10_000_000_000)], seconds)
    assert "It fits: 10.0 GB" in describe(fitting, Storage(None, 1))


def test_what_the_plan_does_not_know_is_refused() -> None:
    offload = ["engine=deepspeed", "deepspeed.offload_optimizer=true"]
    code, output = rmoe("plan", *TINY, "--gpus", "4", *offload)
    assert (code, "counts the memory of GPUs" in output) == (2, True), output
    code, output = rmoe("plan", *TINY, "--gpus", "4", "precision=fp8_emulated")
    assert (code, "rmoe plan counts in fp32 and bf16" in output) == (2, True), output
    code, output = rmoe("plan", *TINY, "--gpus", "4", "parallel.tensor_model_parallel_size=4")
    assert code == 2, output
    code, output = rmoe("plan", *TINY, "--gpus", "4", "data.buckets={multiple: 8}")
    assert (code, "one size of picture" in output) == (2, True), output
