"""What a run logs of its gates, in every layout: the load-balancing loss is 1 where tokens spread evenly and M where one module has all,
and the shares of tokens by module say so, too.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.diffusion.loss import DiffusionLoss
from tests.model.test_compile import make_batch
from tests.support.configurations import MODEL, RECURRENCE, one_rank, tiny_config
from tests.support.ranks import MMDIT, batches, conditions, configuration, layout, run_on_ranks


def logged(config: RunConfig) -> dict[float, dict[str, float]]:
    """The metrics after a step in which the logits of module 2 are a number and the others' 0, by that number."""
    from rmoe_megatron.distributed.process_groups import process_groups
    from rmoe_megatron.engine.registry import build_engine
    from rmoe_megatron.model.build import build_chunks
    from rmoe_megatron.model.recurrence.gate import Gate

    favourite = 0.0

    def gating(gate: Gate, input: Tensor, conditioning: Tensor) -> Tensor:
        found = original(gate, input, conditioning) * 0
        return found + favourite * (torch.arange(gate.num_experts) == 2)

    original, Gate.gating, found = Gate.gating, gating, {}  # type: ignore[method-assign]
    try:
        with process_groups(config) as device:
            modules = build_chunks(config).to(device)
            null = conditions(config, torch.zeros(1)).map(torch.zeros_like)
            engine = build_engine(config, modules, DiffusionLoss(config, config.seed, null))
            for favourite in (EVEN, COLLAPSED):
                for micro_batches in list(batches(config))[
                    :2
                ]:  # the second step's has nothing of the first's
                    engine.step(micro_batches, watches_gates=True)
                found[favourite] = engine.routing_metrics()
    finally:
        Gate.gating = original  # type: ignore[method-assign]
    return found


EVEN, COLLAPSED = 0.0, 1000.0
LAYOUTS = {
    "DP2": layout(), "TP2": layout(tp=2), "CP2": layout(cp=2), "PP2": layout(pp=2), "PP2-interleaved": layout(pp=2, vpp=2),
    "EP2": layout(ep=2),
}  # fmt: skip


def test_even_is_one_and_collapsed_is_the_number_of_modules(tmp_path: Path) -> None:
    model = configuration(MMDIT, recurrent=True)
    places = [f"{layer}_{step}" for layer in model.recurrence.layers for step in (1, 2, 3)]
    names = {f"module_share_{place}_{module}" for place in places for module in range(4)}
    one = run_on_ranks(1, {"one": model}, tmp_path, logged)["one"]
    cases = {name: replace(model, parallel=parallel) for name, parallel in LAYOUTS.items()}
    for name, found in {"one": one, **run_on_ranks(2, cases, tmp_path, logged)}.items():
        losses = {favourite: metrics.pop("load_balancing_loss") for favourite, metrics in found.items()}
        assert losses == pytest.approx({EVEN: 1.0, COLLAPSED: 4.0}, rel=1e-5), name
        assert {each: found[COLLAPSED][each] for each in names} == {
            each: float(each.endswith("_2")) for each in names
        }, name
        for place in places:
            shares = [found[EVEN][f"module_share_{place}_{module}"] for module in range(4)]
            assert sum(shares) == pytest.approx(1), name
            assert all(0.1 < share < 0.4 for share in shares), (
                name,
                shares,
            )  # by noise that is the same for all modules


@pytest.mark.parametrize("depths", [(2, 5), (5, 2)])
def test_a_second_model_of_a_process_may_be_of_another_depth(depths: tuple[int, int]) -> None:
    """Megatron-Core keeps what it counts in a tensor of one entry a block."""
    from rmoe_megatron.engine.registry import build_engine
    from rmoe_megatron.model.build import build_chunks

    for depth in depths:
        last = replace(RECURRENCE, layers=[depth - 1])
        config = tiny_config(last, model=replace(MODEL, num_layers=depth))
        with one_rank(config):
            null = make_batch(0).conditions.map(lambda tensor: tensor[:1])
            engine = build_engine(config, build_chunks(config), DiffusionLoss(config, config.seed, null))
            engine.step([make_batch(1)])
            assert 0.5 < engine.routing_metrics()["load_balancing_loss"] < 4
