"""What is planned is what a run does: memory and messages of fake ranks against those of real ones, and against closed forms."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensor_memory import peak_tensor_bytes

from rmoe_megatron.config.model import LoraConfig
from rmoe_megatron.config.run import OptimizerName, Precision, Recompute, RunConfig
from rmoe_megatron.model import core_attention
from rmoe_megatron.model.softmax_attention import Way
from rmoe_megatron.planning.dry_run import RankUsage, dry_run
from rmoe_megatron.planning.listening import Collective, Listener, Place
from tests.support.configurations import MODEL, one_rank, tiny_config
from tests.support.ranks import DIT, MMDIT, conditions, configuration, layout, run_on_ranks

DENSE = configuration(MMDIT, recurrent=False)
LAYOUTS = {
    "DP2": layout(),
    "TP2": layout(tp=2),
    "CP2": layout(cp=2),
    "PP2": layout(pp=2),
    "PP2-interleaved": layout(pp=2, vpp=2),
}


def take_step(config: RunConfig, count: int) -> Any:
    """Build an engine and return a function that takes a step of ``count`` micro-batches."""
    from rmoe_megatron.data.batch import Batch
    from rmoe_megatron.diffusion.loss import DiffusionLoss
    from rmoe_megatron.engine.megatron.engine import MegatronEngine
    from rmoe_megatron.model.build import build_chunks

    null = conditions(config, torch.zeros(1)).map(torch.zeros_like)
    engine = MegatronEngine(config, build_chunks(config), DiffusionLoss(config, config.seed, null))
    model, samples = config.model, config.training.micro_batch_size

    def step() -> None:
        draws = torch.arange(samples)
        latents = torch.ones(samples, model.in_channels, model.sample_size, model.sample_size)
        engine.step([Batch(latents, conditions(config, draws.float()), draws)] * count)

    return step


def messages(config: RunConfig) -> Counter[Collective]:
    """Return what rank 0 of a real run sends in its second step."""
    from rmoe_megatron.distributed.process_groups import process_groups

    with process_groups(config):
        micro_batches = config.training.global_batch_size // (
            config.training.micro_batch_size * (2 if config.parallel == layout() else 1)
        )
        step = take_step(config, micro_batches)
        step()
        with Listener() as listener:
            step()
        return Counter(listener.collectives)


def by_kind(counted: Counter[Collective]) -> Counter[tuple[str, int, tuple[int, ...]]]:
    """Group messages by kind, bytes and ranks: a real run marks no update."""
    found: Counter[tuple[str, int, tuple[int, ...]]] = Counter()
    for message, number in counted.items():
        if len(message.ranks) > 1:
            found[message.kind, message.bytes, message.ranks] += number
    return found


@pytest.mark.distributed
def test_messages_are_those_of_two_real_ranks(tmp_path: Path) -> None:
    cases = {name: replace(DENSE, parallel=parallel) for name, parallel in LAYOUTS.items()}
    for name, sent in run_on_ranks(2, cases, tmp_path, messages).items():
        planned = dry_run(cases[name], rank=0, world_size=2)
        assert by_kind(planned.collectives) == by_kind(sent), name


def test_gradients_and_parameters_travel_once_a_step() -> None:
    """The distributed optimizer of two replicas: gradients in float32 are reduced and scattered, bf16 parameters are gathered."""
    config = replace(DENSE, precision=Precision.bf16)
    with one_rank(config):
        from rmoe_megatron.model.build import build_chunks

        numbers = [parameter.numel() for parameter in build_chunks(config).parameters()]
    usage = dry_run(config, rank=0, world_size=2)
    sums: Counter[str] = Counter()
    for message, count in usage.collectives.items():
        if message.ranks == (0, 1):
            sums[message.kind] += message.bytes * count
    # Parameters lie in buffers at multiples of 64 values.
    padding = 64 * len(numbers)
    assert 4 * sum(numbers) <= sums["reduce-scatter"] <= 4 * (sum(numbers) + padding)
    assert 2 * sum(numbers) <= sums["all-gather"] <= 2 * (sum(numbers) + padding)
    assert usage.averages == 4 * sum(numbers)
    assert (
        2 * sum(numbers) <= usage.parameters <= 2 * (sum(numbers) + padding) + 10_000
    )  # and the table of positions
    assert 4 * sum(numbers) <= usage.gradients <= 4 * (sum(numbers) + padding)
    # Main weights and both moments in float32, half of them on this rank.
    assert 6 * sum(numbers) <= usage.optimizer <= 6 * (sum(numbers) + padding) + 10_000


LARGER = replace(
    MODEL, sample_size=16, hidden_size=128, num_attention_heads=4, num_layers=4, text_length=16, text_hidden_size=64,
    pooled_size=64, pos_embed_max_size=8,
)  # fmt: skip


MUON = replace(tiny_config().optimizer, name=OptimizerName.muon, distributed_optimizer=False)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": Precision.bf16},
        {"model": replace(DIT, hidden_size=128, sample_size=16)},
        {"lora": LoraConfig(layers=[0, 2], rank=4)},
        {"optimizer": MUON},
        {"optimizer": MUON, "precision": Precision.bf16},
    ],
    ids=["fp32", "bf16", "dit", "lora", "muon", "muon-bf16"],
)
def test_the_fullest_moment_is_that_of_a_real_step(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes on top of what is there before a step, as PyTorch's profiler counts them."""
    training = replace(tiny_config().training, micro_batch_size=16, global_batch_size=16)
    config = replace(tiny_config(None, model=LARGER, training=training), **changes)
    usage = dry_run(config, rank=0, world_size=1)
    monkeypatch.setattr(core_attention, "way_to_attend", lambda *_: Way.fused)
    with one_rank(config) as device:
        step = take_step(config, 1)
        step()
        measured = peak_tensor_bytes(step, device)
    assert usage.activations == pytest.approx(measured, rel=0.02)


def test_recomputing_keeps_less_and_computes_more() -> None:
    training = replace(tiny_config().training, micro_batch_size=16, global_batch_size=16)
    kept = tiny_config(None, model=LARGER, training=training)
    again = replace(kept, training=replace(training, recompute=Recompute.full))
    usages = [dry_run(config, rank=0, world_size=1) for config in (kept, again)]

    def flops(usage: RankUsage) -> int:
        return sum(operation.flops * count for operation, count in usage.operations.items())

    assert usages[1].activations < 0.6 * usages[0].activations
    # Of a block that is computed again its input alone is kept: [S, B, H] in float32, 64 patches and 16 tokens of 128 values.
    hidden = 80 * 16 * 128 * 4
    alive = [
        {block: usage.at_peak[Place(f"block {block}", "forward")] for block in range(4)} for usage in usages
    ]
    assert all(size > 5 * hidden for size in alive[0].values())
    assert alive[1][0] == alive[1][1] == hidden
    assert max(size for place, size in usages[1].at_peak.items() if place.phase == "backward") > 5 * hidden
    # The blocks' forward pass, a third of what they compute, takes place again.
    assert 1.2 < flops(usages[1]) / flops(usages[0]) < 1.35


def test_flops_are_those_of_the_closed_form() -> None:
    """Matrix products of forward and backward; attention's kernel computes its products once more in the backward pass."""
    from rmoe_megatron.model.flops import training_flops_per_sample

    config = tiny_config(None, model=LARGER)
    usage = dry_run(config, rank=0, world_size=1)
    sums: Counter[str] = Counter()
    for operation, count in usage.operations.items():
        sums[operation.kind] += operation.flops * count
    # Four products of S x S x H forward and backward each pay twice in the closed form: 2 + 4; the kernel's are 2 + 5.
    expected = training_flops_per_sample(config) * config.training.global_batch_size
    assert sums["product"] + sums["attention"] * 6 / 7 == pytest.approx(expected, rel=0.02)


def test_micro_batches_that_are_alike_are_counted_and_not_taken() -> None:
    """Four micro-batches compute four times what one does, and send their gradients once."""
    one = replace(DENSE, training=replace(DENSE.training, global_batch_size=4))
    four = replace(DENSE, training=replace(DENSE.training, global_batch_size=16))
    usages = [dry_run(config, rank=0, world_size=2) for config in (one, four)]
    assert [usage.micro_batches for usage in usages] == [1, 4]
    forward = [
        sum(count for operation, count in usage.operations.items() if operation.phase == "forward")
        for usage in usages
    ]
    assert forward[1] == 4 * forward[0]
    assert by_kind(usages[0].collectives) == by_kind(usages[1].collectives)


def test_modules_get_as_many_tokens_each() -> None:
    """Two expert-parallel ranks: half of this rank's tokens leave it, in every latent step, and come back three times as wide."""
    config = replace(configuration(MMDIT, recurrent=True), parallel=layout(ep=2))
    usage = dry_run(config, rank=1, world_size=2)
    tokens = config.training.micro_batch_size * (config.model.sample_size // config.model.patch_size) ** 2
    sent: Counter[tuple[str, int]] = Counter()
    for message, count in usage.collectives.items():
        if message.kind == "all-to-all":
            assert message.ranks == (0, 1)
            sent[message.phase, message.bytes] += count
    hidden_bytes = tokens * config.model.hidden_size * 4
    assert config.recurrence is not None
    calls = len(config.recurrence.layers) * config.recurrence.steps * usage.micro_batches
    assert sent["forward", hidden_bytes] == calls
    assert sent["forward", 3 * hidden_bytes] == calls
    assert sent["backward", 3 * hidden_bytes] == calls
    assert sent["backward", hidden_bytes] == calls


def test_an_imbalance_brings_more_tokens_to_this_rank() -> None:
    """Of two ranks' tokens this one's modules get three quarters: one and a half times what it has itself."""
    config = replace(configuration(MMDIT, recurrent=True), parallel=layout(ep=2))
    even, uneven = (dry_run(config, rank=1, world_size=2, imbalance=factor) for factor in (1.0, 1.5))
    tokens = config.training.micro_batch_size * (config.model.sample_size // config.model.patch_size) ** 2
    hidden_bytes = tokens * config.model.hidden_size * 4
    received = {
        message.bytes
        for message in uneven.collectives
        if (message.kind, message.phase) == ("all-to-all", "forward")
    }
    assert {3 * hidden_bytes // 2, 9 * hidden_bytes // 2} <= received
    assert uneven.activations > even.activations
