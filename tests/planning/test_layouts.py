"""Memory and messages of fake ranks against those of real ones, in layouts of both engines."""

import gc
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensor_memory import held_tensor_bytes, peak_tensor_bytes
from torch import Tensor

from rmoe_megatron.config.model import LoraConfig
from rmoe_megatron.config.run import DeepSpeedConfig, EngineName, Precision, Recompute, RunConfig
from rmoe_megatron.planning.dry_run import dry_run
from rmoe_megatron.planning.listening import Collective, Listener
from tests.support.configurations import RECURRENCE, tiny_config
from tests.support.ranks import MMDIT, conditions, layout, run_on_ranks

# By how much the profiler may count more: gloo's own buffers for what it sends, which a GPU does not have.
GLOO = 0.035

WIDER = replace(
    MMDIT, hidden_size=64, num_attention_heads=4, sample_size=16, text_length=16, pos_embed_max_size=8, dual_attention_layers=[],
)  # fmt: skip


def run_of(recurrent: bool, micro_batches: int = 1, **changes: Any) -> RunConfig:
    """A run in bf16 of blocks of 64 values, 80 tokens a sample and sixteen samples a micro-batch."""
    recurrence = replace(RECURRENCE, layers=[0, 1, 2, 3], steps=2, rank=8) if recurrent else None
    training = replace(
        tiny_config().training, micro_batch_size=16, recompute=changes.pop("recompute", Recompute.none)
    )
    config = tiny_config(recurrence, model=WIDER, precision=Precision.bf16, training=training, **changes)
    ranks = (
        4
        if config.parallel.tensor_model_parallel_size * config.parallel.expert_model_parallel_size > 2
        else 2
    )
    parallel = config.parallel
    data = ranks // (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )
    return replace(config, training=replace(training, global_batch_size=16 * data * micro_batches))


def zero(stage: int, **changes: Any) -> dict[str, Any]:
    """DeepSpeed's engine, whose buckets would be larger than these models."""
    options = {"reduce_bucket_size": 100_000}
    return {
        "engine": EngineName.deepspeed,
        "deepspeed": DeepSpeedConfig(stage, engine_options=options),
        **changes,
    }


TWO_RANKS = {
    "dense, data": run_of(False, 2),
    "dense, tensor": run_of(False, parallel=layout(tp=2)),
    "dense, context": run_of(False, parallel=layout(cp=2)),
    "dense, pipeline interleaved": run_of(False, 4, parallel=layout(pp=2, vpp=2)),
    "dense, selective recomputation": run_of(False, recompute=Recompute.selective),
    "dense, overlapped": run_of(False, parallel=layout(overlap_grad_reduce=True, overlap_param_gather=True)),
    "LoRA, full recomputation": run_of(
        False, lora=LoraConfig(layers=[0, 1, 2, 3], rank=4), recompute=Recompute.full
    ),
    "recurrent, experts": run_of(True, parallel=layout(ep=2)),
    "recurrent, pipeline, full recomputation": run_of(
        True, 2, parallel=layout(pp=2), recompute=Recompute.full
    ),
    "dense, ZeRO 1": run_of(False, 3, **zero(1)),
    "recurrent, ZeRO 2, experts": run_of(True, 2, parallel=layout(ep=2), **zero(2)),
    "LoRA, ZeRO 2": run_of(False, lora=LoraConfig(layers=[0, 1, 2, 3], rank=4), **zero(2)),
    "recurrent, ZeRO 3": run_of(True, 2, **zero(3)),
}
FOUR_RANKS = {"recurrent, tensor and experts": run_of(True, parallel=layout(tp=2, ep=4))}


@dataclass
class Measured:
    """Of every rank of a real run: bytes that stay, bytes at the fullest moment of a step, and messages of it.

    The first two are the profiler's, gloo's own buffers included; the next two those of tensors that PyTorch's dispatcher has seen.
    """

    kept: int
    peak: int
    seen_kept: int
    seen_peak: int
    messages: Counter[tuple[str, int, tuple[int, ...]]]


def measured(config: RunConfig) -> list[Measured]:
    """Take steps with the kernels and the balanced routing that a plan counts with, and listen to the third."""
    from rmoe_megatron.data.batch import Batch
    from rmoe_megatron.diffusion.loss import DiffusionLoss
    from rmoe_megatron.distributed.process_groups import process_groups
    from rmoe_megatron.engine.registry import build_engine
    from rmoe_megatron.model import core_attention
    from rmoe_megatron.model.build import build_chunks
    from rmoe_megatron.model.recurrence.experts import Experts
    from rmoe_megatron.model.recurrence.gate import Gate
    from rmoe_megatron.model.softmax_attention import Way
    from rmoe_megatron.training.ema import ExponentialMovingAverage

    gc.collect()  # what is left of the layout before
    core_attention.way_to_attend = lambda *_: Way.fused
    Experts.sorts = lambda self, tokens: self.fits_grouped_mm  # type: ignore[method-assign]
    draw_noise = Gate.draw_noise

    def noise_of_balance(gate: Gate, keys: Tensor, tokens: int, steps: int) -> Tensor:
        noise = draw_noise(gate, keys, tokens, steps)
        modules = torch.arange(tokens * len(keys)) % gate.num_experts
        noise.copy_(torch.nn.functional.one_hot(modules, gate.num_experts).view(noise[0].shape) * 1e6)
        return noise

    Gate.draw_noise = noise_of_balance  # type: ignore[method-assign]
    with process_groups(config) as device:
        found: list[Measured] = []
        step: Any = None

        def build() -> None:
            nonlocal step
            null = conditions(config, torch.zeros(1)).map(torch.zeros_like)
            engine = build_engine(config, build_chunks(config), DiffusionLoss(config, config.seed, null))
            averages = ExponentialMovingAverage(engine.parameters, 0.9, main_weights=engine.main_weights)
            data = dist.get_world_size() // (
                config.parallel.tensor_model_parallel_size
                * config.parallel.pipeline_model_parallel_size
                * config.parallel.context_parallel_size
            )
            samples, model = config.training.micro_batch_size, config.model
            count = config.training.global_batch_size // samples // data

            def step_once() -> None:
                draws = torch.arange(samples)
                latents = torch.ones(samples, model.in_channels, model.sample_size, model.sample_size)
                batches = [
                    Batch(latents.clone(), conditions(config, draws.float()), draws) for _ in range(count)
                ]
                engine.step(batches, lambda: averages.update(1))

            step = step_once
            step()
            gc.collect()

        with Listener() as listener:
            kept = held_tensor_bytes(build)
            seen = listener.memory.live
            peak = peak_tensor_bytes(step, device)
            gc.collect()
            listener.begin()
            step()
        messages: Counter[tuple[str, int, tuple[int, ...]]] = by_kind(listener.collectives)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, Measured(kept, kept + peak, seen, listener.memory.peak, messages))
        found.extend(everyone)
        return found


def check(names: list[str], ranks: int, folder: Path) -> None:
    """Hold plans to real runs: the first rank of every pipeline stage."""
    cases = {name: (TWO_RANKS | FOUR_RANKS)[name] for name in names}
    real = run_on_ranks(ranks, cases, folder, measured)
    for name, config in cases.items():
        stages = config.parallel.pipeline_model_parallel_size
        for rank in range(0, ranks, ranks // stages):
            usage, found = dry_run(config, rank, ranks), real[name][rank]
            assert by_kind(usage.collectives) == found.messages, (name, rank)
            assert usage.peak == pytest.approx(found.seen_peak, rel=0.02), (name, rank)
            assert usage.peak == pytest.approx(found.peak, rel=GLOO), (name, rank)


@pytest.mark.distributed
def test_memory_and_messages_are_those_of_two_real_ranks(tmp_path: Path) -> None:
    """One layout of each engine; the others are in the whole matrix."""
    check(["recurrent, experts", "dense, ZeRO 1"], 2, tmp_path)


@pytest.mark.distributed_full
def test_memory_and_messages_of_every_layout(tmp_path: Path) -> None:
    check(list(TWO_RANKS), 2, tmp_path)


@pytest.mark.distributed_full
def test_memory_and_messages_of_four_ranks(tmp_path: Path) -> None:
    check(list(FOUR_RANKS), 4, tmp_path)


def by_kind(counted: Counter[Collective]) -> Counter[tuple[str, int, tuple[int, ...]]]:
    """Group messages by kind, bytes and ranks: a real run marks no update."""
    found: Counter[tuple[str, int, tuple[int, ...]]] = Counter()
    for message, number in counted.items():
        if len(message.ranks) > 1:
            found[message.kind, message.bytes, message.ranks] += number
    return found
