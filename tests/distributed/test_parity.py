"""Every parallel layout trains as one process does.

Compared are outputs, gradients of randomised weights before clipping, their norms, the losses of ten clipped steps, and
the whole model's weights and averages after them. In the layout the run is saved after five steps and goes on as another
engine that has loaded it (in CI where ranks are as many as cores); the one process goes through.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rmoe_megatron.config.model import LoraConfig
from rmoe_megatron.config.run import Fp8Config, Fp8Recipe, ParallelConfig, Precision, Recompute, RunConfig
from tests.support.ranks import (
    DIT,
    MMDIT,
    RECURRENT,
    STEPS,
    Result,
    configuration,
    layout,
    run_on_ranks,
    train,
)

MODELS = {
    "mmdit": configuration(MMDIT, recurrent=False),
    "mmdit-recurrent": configuration(MMDIT, recurrent=True),
    "mmdit-full-rank": configuration(MMDIT, recurrent=True, recurrence=replace(RECURRENT, rank=None)),
    # In a pipeline only the last stage has modules.
    "mmdit-last-block": configuration(MMDIT, recurrent=True, recurrence=replace(RECURRENT, layers=[3])),
    "mmdit-lora": configuration(MMDIT, recurrent=False, lora=LoraConfig(layers=[0, 2], rank=4)),
    "dit": configuration(DIT, recurrent=False),
    "dit-recurrent": configuration(DIT, recurrent=True),
}
LAYOUTS = {
    "TP2": (2, layout(tp=2)),
    "CP2": (2, layout(cp=2)),
    "PP2": (2, layout(pp=2)),
    "PP2-interleaved": (2, layout(pp=2, vpp=2)),
    "DP2": (2, layout()),
    "EP2": (2, layout(ep=2)),
    "EP2-over-TP2": (2, layout(tp=2, ep=2)),
    "EP2-over-CP2": (2, layout(cp=2, ep=2)),
    "TP4": (4, layout(tp=4)),
    "PP4": (4, layout(pp=4)),
    "EP4": (4, layout(ep=4)),
    "EP4-over-TP4": (4, layout(tp=4, ep=4)),
    "EP2-TP2": (4, layout(ep=2, tp=2)),
    "EP4-TP2": (4, layout(ep=4, tp=2)),
    "EP2-PP2": (4, layout(ep=2, pp=2)),
    "EP2-PP2-interleaved": (4, layout(ep=2, pp=2, vpp=2)),
    "DP2-EP2": (4, layout(ep=2)),
    "CP2-TP2": (4, layout(cp=2, tp=2, ep=2)),
    "CP2-PP2": (4, layout(cp=2, pp=2)),
    "TP2-PP2-EP2": (8, layout(tp=2, pp=2, ep=2)),
    "TP2-CP2-PP2-EP4": (8, layout(tp=2, cp=2, pp=2, ep=4)),
}


RESUMED = partial(train, resumes=True)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return run_on_ranks(1, MODELS, tmp_path_factory.mktemp("one"))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, what: str) -> None:
    assert actual.keys() == expected.keys()
    # A tensor's error is measured against its own size, but not below a thousandth of the typical one: the gradient of
    # a key's bias is zero but for rounding.
    floor = 1e-3 * torch.stack([tensor.norm() for tensor in expected.values()] or [torch.zeros(())]).median()
    for name, tensor in expected.items():
        error = (actual[name] - tensor).norm() / tensor.norm().clamp_min(floor)
        assert error < tolerance, f"{what} of {name} differs by {error:.1e}"


def assert_same_run(actual: Result, expected: Result, tolerance: float = 1e-5, what: str = "") -> None:
    for name, weight in expected.initial.items():
        assert torch.equal(actual.initial[name], weight), f"{what} initial {name} depends on the layout"
    assert_same(actual.gradients, expected.gradients, tolerance, f"{what} gradient")
    assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=tolerance), what
    assert len(actual.losses) == len(expected.losses) == STEPS
    assert actual.losses == pytest.approx(expected.losses, rel=tolerance), what
    assert_same(actual.final, expected.final, tolerance, f"{what} weight")
    assert_same(actual.averages, expected.averages, tolerance, f"{what} average")
    assert actual.validation_loss == pytest.approx(expected.validation_loss, rel=tolerance)
    assert len(expected.denoised) > 0
    for ours, theirs in zip(actual.denoised, expected.denoised, strict=True):
        assert (ours - theirs).norm() < tolerance * theirs.norm()


def fitting(models: dict[str, RunConfig], parallel: ParallelConfig) -> dict[str, RunConfig]:
    """The models in this layout; experts are spread only where there are some."""
    return {
        name: replace(config, parallel=parallel)
        for name, config in models.items()
        if config.recurrence is not None or parallel.expert_model_parallel_size == 1
    }


# What CI takes of the matrix: of every layout a model or two.
CHOSEN = {
    "TP2": ["mmdit-recurrent", "dit"],
    "CP2": ["mmdit-recurrent", "dit"],
    "PP2": ["mmdit-recurrent", "mmdit-last-block"],
    "PP2-interleaved": ["mmdit-recurrent"],
    "DP2": ["mmdit-recurrent", "mmdit-lora"],
    "EP2": ["mmdit-full-rank", "dit-recurrent"],
    "EP2-over-TP2": ["mmdit-recurrent"],
    "EP2-over-CP2": ["mmdit-recurrent"],
    "TP4": ["mmdit"],
    "PP4": ["dit"],
    "EP4": ["mmdit-recurrent"],
    "EP4-over-TP4": ["dit-recurrent"],
    "EP2-TP2": ["mmdit-full-rank"],
    "EP4-TP2": ["mmdit-recurrent"],
    "EP2-PP2": ["mmdit-recurrent"],
    "EP2-PP2-interleaved": ["dit-recurrent"],
    "DP2-EP2": ["mmdit-recurrent"],
    "CP2-TP2": ["mmdit-recurrent"],
    "CP2-PP2": ["mmdit-lora"],
    "TP2-PP2-EP2": ["mmdit-recurrent"],
    "TP2-CP2-PP2-EP4": ["mmdit-recurrent"],
}


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_layout_trains_as_one_process(
    ranks: int, one_process: dict[str, Result], tmp_path: Path
) -> None:
    """The layouts of a number of ranks take turns in the same processes, which start once."""
    assert CHOSEN.keys() == LAYOUTS.keys()
    cases = {
        f"{name} {model}": replace(MODELS[model], parallel=parallel)
        for name, (needed, parallel) in LAYOUTS.items()
        for model in CHOSEN[name]
        if needed == ranks
    }
    assert cases
    # More ranks than cores take seconds for a checkpoint: those of four and eight are resumed in the whole matrix.
    job = RESUMED if ranks == 2 else train
    for case, result in run_on_ranks(ranks, cases, tmp_path, job).items():
        assert_same_run(result, one_process[case.split()[1]], what=case)


@pytest.mark.distributed_full
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_model_trains_in_a_layout_as_in_one_process(
    name: str, one_process: dict[str, Result], tmp_path: Path
) -> None:
    ranks, parallel = LAYOUTS[name]
    for model, result in run_on_ranks(ranks, fitting(MODELS, parallel), tmp_path, RESUMED).items():
        assert_same_run(result, one_process[model])


def rounded(model: str, parallel: ParallelConfig, recipe: Fp8Recipe = Fp8Recipe.mxfp8) -> RunConfig:
    return replace(
        MODELS[model], parallel=parallel, precision=Precision.fp8_emulated, fp8=Fp8Config(recipe, 0, 0)
    )


@pytest.mark.parametrize(
    ("name", "model"),
    [
        pytest.param("DP2", "mmdit", marks=pytest.mark.distributed_full),
        pytest.param("PP2", "dit", marks=pytest.mark.distributed_full),
        ("EP2-PP2", "mmdit-recurrent"),
    ],
)
def test_emulated_precision_trains_as_one_process(name: str, model: str, tmp_path: Path) -> None:
    """Micro-batches are those of one process, and so are the tensors that are rounded."""
    ranks, parallel = LAYOUTS[name]
    recipes = [Fp8Recipe.tensorwise, Fp8Recipe.mxfp8]
    expected, found = (
        run_on_ranks(number, {each.value: rounded(model, spread, each) for each in recipes}, tmp_path)
        for number, spread in ((1, layout()), (ranks, parallel))
    )
    for recipe, result in found.items():
        # In bf16 a sum in another order can round to another number, and a scale with it.
        assert result.losses == pytest.approx(expected[recipe].losses, rel=5e-3)
        assert result.grad_norms == pytest.approx(expected[recipe].grad_norms, rel=5e-2)


def test_delayed_scales_are_the_same_on_all_ranks(tmp_path: Path) -> None:
    """Or their replicas of the weights would differ, which run_on_ranks refuses."""
    expected = run_on_ranks(1, {"delayed": rounded("mmdit", layout(), Fp8Recipe.delayed)}, tmp_path)[
        "delayed"
    ]
    found = run_on_ranks(2, {"delayed": rounded("mmdit", layout(), Fp8Recipe.delayed)}, tmp_path)["delayed"]
    assert found.losses[0] == pytest.approx(expected.losses[0], rel=1e-3)
    assert found.losses == pytest.approx(expected.losses, rel=5e-2)


@pytest.mark.distributed_full
@pytest.mark.parametrize(("name", "model"), [("one", "dit"), ("PP2", "mmdit"), ("EP2", "mmdit-recurrent")])
def test_compiled_blocks_train_as_one_process(
    name: str, model: str, one_process: dict[str, Result], tmp_path: Path
) -> None:
    ranks, parallel = LAYOUTS.get(name, (1, layout()))
    training = replace(MODELS[model].training, compile=True)
    compiled = replace(MODELS[model], parallel=parallel, training=training)
    assert_same_run(run_on_ranks(ranks, {model: compiled}, tmp_path, RESUMED)[model], one_process[model])


RECURRENT_RUN = MODELS["mmdit-recurrent"]
SWITCHES: dict[str, dict] = {
    "recompute-selective": {"training": replace(RECURRENT_RUN.training, recompute=Recompute.selective)},
    "recompute-full": {"training": replace(RECURRENT_RUN.training, recompute=Recompute.full)},
    "replicated-optimizer": {"optimizer": replace(RECURRENT_RUN.optimizer, distributed_optimizer=False)},
}


@pytest.mark.parametrize(
    "name",
    [
        "one",
        pytest.param("EP2-over-TP2", marks=pytest.mark.distributed_full),
        pytest.param("DP2", marks=pytest.mark.distributed_full),
        pytest.param("TP2", marks=pytest.mark.distributed_full),
        pytest.param("CP2", marks=pytest.mark.distributed_full),
        pytest.param("EP2-over-CP2", marks=pytest.mark.distributed_full),
        pytest.param("PP2-interleaved", marks=pytest.mark.distributed_full),
        pytest.param("EP2-PP2", marks=pytest.mark.distributed_full),
    ],
)
def test_switches_train_as_one_process(name: str, one_process: dict[str, Result], tmp_path: Path) -> None:
    ranks, parallel = LAYOUTS.get(name, (1, layout()))
    cases = {
        switch: replace(RECURRENT_RUN, parallel=parallel, **changes) for switch, changes in SWITCHES.items()
    }
    for result in run_on_ranks(ranks, cases, tmp_path, RESUMED).values():
        assert_same_run(result, one_process["mmdit-recurrent"])


OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 5000}  # several buckets


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        pytest.param(2, layout(**OVERLAP), id="DP2"),
        pytest.param(2, layout(overlap_grad_reduce=True), id="DP2-gradients-only"),
        pytest.param(
            4, layout(tp=2, ep=2, **OVERLAP), id="EP2-over-TP2-DP2", marks=pytest.mark.distributed_full
        ),
        pytest.param(
            4,
            layout(pp=2, vpp=2, ep=2, **OVERLAP),
            id="EP2-PP2-interleaved",
            marks=pytest.mark.distributed_full,
        ),
    ],
)
def test_overlap_trains_as_one_process(
    ranks: int, parallel: ParallelConfig, one_process: dict[str, Result], tmp_path: Path
) -> None:
    result = run_on_ranks(ranks, {"overlap": replace(RECURRENT_RUN, parallel=parallel)}, tmp_path)["overlap"]
    assert_same_run(result, one_process["mmdit-recurrent"])


def test_the_size_of_micro_batches_changes_nothing_but_the_load_balancing_loss(tmp_path: Path) -> None:
    recurrence = replace(RECURRENT, aux_loss_coeff=0.0)
    cases = {
        str(size): replace(
            RECURRENT_RUN,
            recurrence=recurrence,
            training=replace(RECURRENT_RUN.training, micro_batch_size=size),
        )
        for size in (1, 2, 8)
    }
    results = run_on_ranks(1, cases, tmp_path)
    for size in ("1", "8"):
        assert_same_run(results[size], results["2"])


@pytest.mark.parametrize(
    "name",
    ["EP2-over-TP2"]
    + [
        pytest.param(name, marks=pytest.mark.distributed_full) for name in ("TP2", "CP2", "PP2", "EP2", "DP2")
    ],
)
def test_bf16_is_as_close_to_float32_in_a_layout_as_in_one_process(
    name: str, one_process: dict[str, Result], tmp_path: Path
) -> None:
    ranks, parallel = LAYOUTS[name]
    config = replace(RECURRENT_RUN, precision=Precision.bf16)
    one = run_on_ranks(1, {"bf16": config}, tmp_path)["bf16"]
    spread = run_on_ranks(ranks, {"bf16": replace(config, parallel=parallel)}, tmp_path)["bf16"]
    exact = one_process["mmdit-recurrent"]
    for tensors in ("gradients", "final", "averages"):
        errors = [relative_errors(getattr(run, tensors), getattr(exact, tensors)) for run in (one, spread)]
        assert 0 < errors[0].mean() < 0.5
        # Sums are rounded in another order: single tensors vary, the typical error does not.
        assert errors[1].mean() < 1.25 * errors[0].mean()
        assert errors[1].max() < 2 * errors[0].max()
    assert spread.losses == pytest.approx(one.losses, rel=1e-2)
    assert spread.grad_norms == pytest.approx(one.grad_norms, rel=2e-2)


def relative_errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> Tensor:
    return torch.stack(
        [(actual[name] - tensor).norm() / tensor.norm() for name, tensor in expected.items() if tensor.any()]
    )


def test_the_load_balancing_loss_depends_on_the_size_of_micro_batches_a_little(tmp_path: Path) -> None:
    """It is a function of a micro-batch's tokens. At coefficient 0.01 the gradient moves by about 1 percent."""
    cases = {
        str(size): replace(
            RECURRENT_RUN,
            training=replace(RECURRENT_RUN.training, micro_batch_size=size, global_batch_size=8),
        )
        for size in (1, 8)
    }
    results = run_on_ranks(1, cases, tmp_path)
    gradients = [
        torch.cat([tensor.flatten() for tensor in results[size].gradients.values()]) for size in ("1", "8")
    ]
    difference = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert 1e-4 < difference < 0.03
