"""What a run logs of how its gates decide: by hand, against the definitions, and in every layout as in one process."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rmoe_megatron.config.run import EngineName, Recompute, RunConfig
from rmoe_megatron.diffusion.loss import DiffusionLoss
from rmoe_megatron.engine.gate_health import TIME_BINS, gate_health
from rmoe_megatron.model.recurrence.gate_watch import GateWatch
from tests.support.configurations import RECURRENCE, one_rank, tiny_config
from tests.support.ranks import (
    MMDIT,
    batches,
    conditions,
    configuration,
    layout,
    perturb,
    run_on_ranks,
)

ONE_LAYER = tiny_config(replace(RECURRENCE, layers=[2], num_modules=2, steps=2))


def health_of(
    logits: list[Tensor], picked: list[Tensor], times: Tensor, config: RunConfig = ONE_LAYER
) -> dict[str, float]:
    """The figures of a gate of block 2 whose latent steps have these logits [S, B, M], for samples of these times."""
    watch, keys = GateWatch(), torch.arange(len(times))
    for step, (values, choice) in enumerate(zip(logits, picked, strict=True), start=1):
        watch.see(2, step, keys, values, choice)
    with one_rank(config):
        return gate_health(config, watch.calls, lambda keys: times[keys], torch.device("cpu"))


def one_hot(modules: Tensor, num_modules: int) -> Tensor:
    return modules.unsqueeze(-1) == torch.arange(num_modules)


def test_figures_that_are_worked_out_by_hand() -> None:
    """Two tokens of two samples, two modules. ln 3 more is three times as likely: H(1/4) = 0.8112781 bits."""
    even, first, second = (0.0, 0.0), (math.log(3), 0.0), (0.0, math.log(3))
    logits = [torch.tensor([[first, first], [first, second]]), torch.tensor([[even, first], [first, first]])]
    picked = [one_hot(torch.tensor([[0, 0], [1, 0]]), 2), one_hot(torch.tensor([[1, 1], [1, 1]]), 2)]
    found = health_of(logits, picked, torch.tensor([0.1, 0.9]))
    assert [found[f"module_share_2_1_{module}"] for module in (0, 1)] == [0.75, 0.25]
    assert [found[f"module_share_2_2_{module}"] for module in (0, 1)] == [0.0, 1.0]
    assert (found["module_share_least"], found["module_share_most"]) == (0.0, 1.0)
    assert found["gate_entropy_2_1"] == pytest.approx(0.8112781)
    assert found["gate_entropy_2_2"] == pytest.approx((3 * 0.8112781 + 1) / 4)
    assert found["gate_entropy"] == pytest.approx((7 * 0.8112781 + 1) / 8)
    assert found["gate_margin_2_1"] == pytest.approx(math.log(3))
    assert found["gate_margin_2_2"] == pytest.approx(0.75 * math.log(3))
    assert "gate_switch_rate_2_1" not in found
    assert (
        found["gate_switch_rate_2_2"] == found["gate_switch_rate"] == 0.25
    )  # the one token that was another module's
    # Two samples in two bins do not say how much samples of one bin differ.
    assert not {name for name in found if "by_" in name}


SAMPLES, TOKENS = 30, 8


def of_timestep(times: Tensor) -> Tensor:
    return (times * TIME_BINS).long().float().expand(TOKENS, -1)


@pytest.mark.parametrize("alone", ["timestep", "text", "token"])
def test_logits_that_depend_on_one_thing_alone(alone: str) -> None:
    times = (torch.arange(SAMPLES) % TIME_BINS + 0.5) / TIME_BINS
    of_bin, of_sample, of_token = of_timestep(times), torch.arange(SAMPLES) // TIME_BINS, torch.arange(TOKENS)
    value = {
        "timestep": of_bin,
        "text": of_sample.float().expand(TOKENS, -1),
        "token": of_token.float().unsqueeze(-1).expand(-1, SAMPLES),
    }[alone]
    logits = torch.stack((value, -value), dim=-1)
    picked = one_hot(logits.argmax(-1), 2)
    found = health_of([logits, logits], [picked, picked], times)
    for kind in ("timestep", "text", "token"):
        assert found[f"gate_by_{kind}"] == pytest.approx(float(kind == alone), abs=1e-9), kind


def test_shares_of_the_variance_are_those_of_their_definitions() -> None:
    """Sums of squares about means, in float64; epsilon squared as (between - df * within / df) / total."""
    rng = np.random.default_rng(0)
    times = rng.random(SAMPLES)
    bins = (times * TIME_BINS).astype(int)
    values = rng.normal(size=(TOKENS, SAMPLES, 3)) + rng.normal(size=(1, SAMPLES, 3))
    values += 2 * rng.normal(size=(TIME_BINS, 3))[bins]
    config = tiny_config(replace(RECURRENCE, layers=[2], num_modules=3, steps=1))
    logits = torch.tensor(values, dtype=torch.float32)
    picked = one_hot(logits.argmax(-1), 3)
    found = health_of([logits], [picked], torch.tensor(times), config)
    centred = values - values.mean(axis=-1, keepdims=True)
    mean = centred.mean(axis=(0, 1))
    total = ((centred - mean) ** 2).sum()
    of_samples = centred.mean(axis=0)
    between_samples = TOKENS * ((of_samples - mean) ** 2).sum()
    groups = [of_samples[bins == each] for each in set(bins)]
    between = TOKENS * sum(len(group) * ((group.mean(axis=0) - mean) ** 2).sum() for group in groups)
    within = TOKENS * sum(((group - group.mean(axis=0)) ** 2).sum() for group in groups)
    by_timestep = (between - (len(groups) - 1) * within / (SAMPLES - len(groups))) / total
    assert 0.2 < by_timestep < 0.9
    assert found["gate_by_timestep_2_1"] == pytest.approx(by_timestep, rel=1e-5)
    assert found["gate_by_text_2_1"] == pytest.approx(between_samples / total - by_timestep, rel=1e-5)
    assert found["gate_by_token_2_1"] == pytest.approx(1 - between_samples / total, rel=1e-5)


def watched(config: RunConfig) -> dict[str, float]:
    """The figures of the first step from weights that are all different from zero."""
    from rmoe_megatron.distributed.process_groups import process_groups
    from rmoe_megatron.engine.registry import build_engine
    from rmoe_megatron.model.build import build_chunks

    with process_groups(config) as device:
        modules = build_chunks(config).to(device)
        null = conditions(config, torch.zeros(1)).map(torch.zeros_like)
        perturb(modules, std=0.3)
        engine = build_engine(config, modules, DiffusionLoss(config, config.seed, null))
        step = next(batches(config))
        engine.step(step)
        unwatched = engine.routing_metrics()
        assert not {name for name in unwatched if name.startswith(("gate_", "module_"))}
        modules = build_chunks(config).to(device)
        perturb(modules, std=0.3)
        engine = build_engine(config, modules, DiffusionLoss(config, config.seed, null))
        engine.step(step, watches_gates=True)
        found = engine.routing_metrics()
        found.pop("load_balancing_loss", None)
        return found


def check(found: dict[str, float], one: dict[str, float], name: str) -> None:
    assert set(found) == set(one), name
    for key, value in found.items():
        assert value == pytest.approx(one[key], rel=1e-3, abs=2e-3), (name, key)


ALONE = {
    "recompute": {"recompute": Recompute.full},
    "recompute-selective": {"recompute": Recompute.selective},
    "micro-batches of one": {"micro_batch_size": 1},
}
LAYOUTS = {
    "DP2": layout(), "TP2": layout(tp=2), "CP2": layout(cp=2), "PP2": layout(pp=2), "PP2-interleaved": layout(pp=2, vpp=2),
    "EP2": layout(ep=2),
}  # fmt: skip


def test_they_are_the_same_in_every_layout(tmp_path: Path) -> None:
    model = configuration(MMDIT, recurrent=True)
    alone = {
        name: replace(model, training=replace(model.training, **changes)) for name, changes in ALONE.items()
    }
    found = run_on_ranks(1, {"one": model, **alone}, tmp_path, watched)
    one = found.pop("one")
    # Three latent steps of two blocks: shares of four modules, and six figures without the first step's switches; their means.
    assert len(one) == 2 * 3 * 4 + 2 * (3 * 6 - 1) + 6 + 2
    assert 0.02 < one["gate_switch_rate"] < 0.98
    assert 0.02 < one["gate_by_token"] < 0.98
    cases = {name: replace(model, parallel=parallel) for name, parallel in LAYOUTS.items()}
    cases["DeepSpeed"] = replace(model, engine=EngineName.deepspeed)
    for name, metrics in {**found, **run_on_ranks(2, cases, tmp_path, watched)}.items():
        check(metrics, one, name)
