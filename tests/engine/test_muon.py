"""Muon's update against Newton-Schulz written out in float64, over layouts and resumes, and what it is refused for."""

import math
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rmoe_megatron.checkpoint.folders import list_checkpoints
from rmoe_megatron.checkpoint.run_checkpoint import Progress, load_checkpoint, save_checkpoint
from rmoe_megatron.config.loading import load_config
from rmoe_megatron.config.model import LoopConfig, LoraConfig
from rmoe_megatron.config.run import (
    EngineName,
    FineTuningConfig,
    GroupLearningRates,
    OptimizerName,
    Precision,
    Recompute,
    RunConfig,
    Trainable,
)
from rmoe_megatron.config.validation import validate
from rmoe_megatron.diffusion.loss import DiffusionLoss
from rmoe_megatron.engine.megatron.engine import MegatronEngine
from rmoe_megatron.errors import UserError
from rmoe_megatron.model.build import build_chunks
from rmoe_megatron.training import run
from rmoe_megatron.training.ema import ExponentialMovingAverage
from rmoe_megatron.training.state import TrainingState
from tests.distributed.test_parity import LAYOUTS, assert_same_run, fitting
from tests.support.commands import rmoe
from tests.support.configurations import one_rank, randomise, tiny_config
from tests.support.ranks import (
    DIT,
    MMDIT,
    RECURRENT,
    batches,
    conditions,
    configuration,
    layout,
    run_on_ranks,
    train,
)
from tests.support.runs import losses, make_run

# Of https://leloykun.github.io/ponder/muon-opt-coeffs, which Megatron-Core calls quintic.
COEFFICIENTS = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]
MOMENTUM = 0.9


def with_muon(config: RunConfig, **changes: Any) -> RunConfig:
    settings = replace(
        config.optimizer,
        name=OptimizerName.muon,
        muon_momentum=MOMENTUM,
        distributed_optimizer=False,
        **changes,
    )
    return replace(config, optimizer=settings)


def orthogonal(matrix: Tensor) -> Tensor:
    """Newton-Schulz, five steps: X <- a X + (b X X^T + c (X X^T)^2) X, on the side that is shorter."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T).T
    found = matrix / matrix.norm().clamp_min(1e-7)  # of queries without a gradient it is 0
    for a, b, c in COEFFICIENTS:
        square = found @ found.T
        found = a * found + (b * square + c * square @ square) @ found
    return found


def direction(name: str, gradient: Tensor, heads: int) -> Tensor:
    """The update of a matrix for a learning rate of 1; queries, keys and values are rows of each head in turn."""
    if "linear_qkv" in name:
        rows = gradient.view(heads, 3, -1, gradient.shape[1])
        parts = [direction("", rows[:, part].flatten(0, 1), heads) for part in range(3)]
        return torch.stack([each.view(heads, -1, gradient.shape[1]) for each in parts], dim=1).view_as(
            gradient
        )
    return 0.2 * math.sqrt(max(gradient.shape)) * orthogonal(gradient)


def is_matrix_of_a_block(name: str, value: Tensor) -> bool:
    return ".layers." in name and value.dim() == 2 and "gate" not in name


class Reference:
    """Muon and AdamW in float64, step by step."""

    def __init__(self, config: RunConfig, weights: dict[str, Tensor]) -> None:
        self.settings, self.heads = config.optimizer, config.model.num_attention_heads
        self.weights = {name: value.detach().double() for name, value in weights.items()}
        self.moments = {name: torch.zeros_like(value) for name, value in self.weights.items()}
        self.squares = {name: torch.zeros_like(value) for name, value in self.weights.items()}
        self.steps = 0

    def step(self, gradients: dict[str, Tensor], learning_rate: float) -> None:
        """Clip by the norm of all gradients, then move every weight."""
        settings = self.settings
        self.steps += 1
        norm = torch.stack([each.norm() for each in gradients.values()]).norm().item()
        scale = min(1.0, settings.clip_grad / (norm + 1e-6))
        for name, weight in self.weights.items():
            gradient, moment, square = gradients[name] * scale, self.moments[name], self.squares[name]
            own = (
                settings.group_learning_rates.recurrence
                if ".recurrence." in name and "gate" not in name
                else None
            )
            rate = learning_rate * ((own or settings.learning_rate) / settings.learning_rate)
            if weight.dim() > 1:
                weight *= 1 - rate * settings.weight_decay
            if is_matrix_of_a_block(name, weight):
                moment.lerp_(gradient, 1 - settings.muon_momentum)
                weight -= rate * direction(name, gradient.lerp(moment, settings.muon_momentum), self.heads)
                continue
            moment.lerp_(gradient, 1 - settings.beta1)
            square.lerp_(gradient**2, 1 - settings.beta2)
            unbiased = (square / (1 - settings.beta2**self.steps)).sqrt() + settings.eps
            weight -= rate * (moment / (1 - settings.beta1**self.steps)) / unbiased


def engine_of(config: RunConfig) -> MegatronEngine:
    modules = build_chunks(config)
    randomise(modules, seed=config.seed)
    null = conditions(config, torch.zeros(1)).map(torch.zeros_like)
    return MegatronEngine(config, modules, DiffusionLoss(config, config.seed, null))


MODELS = {
    "recurrent": configuration(MMDIT, recurrent=True),
    "looped": configuration(MMDIT, recurrent=False, loop=LoopConfig(first=1, last=2, times=2)),
    "dit": configuration(DIT, recurrent=False),
}


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
@pytest.mark.parametrize("kind", MODELS)
def test_steps_are_those_of_muon_and_adamw(kind: str, precision: Precision) -> None:
    """In bf16 the main weights move, by a Newton-Schulz in bf16; the gradients are those that the engine had."""
    rates = GroupLearningRates(recurrence=4e-3) if kind == "recurrent" else GroupLearningRates()
    config = with_muon(
        replace(MODELS[kind], precision=precision), weight_decay=0.1, warmup_steps=2, min_learning_rate=1e-4,
        clip_grad=0.5, group_learning_rates=rates,
    )  # fmt: skip
    validate(config, 1)
    with one_rank(config):
        engine = engine_of(config)
        modules = engine.modules
        before = {name: value.detach().double() for name, value in modules.named_parameters()}
        expected = Reference(config, dict(modules.named_parameters()))
        for micro_batches in islice(batches(config), 4):
            gradients: dict[str, Tensor] = {}

            def look(gradients: dict[str, Tensor] = gradients) -> None:
                gradients |= {name: each.main_grad.double() for name, each in modules.named_parameters()}

            result = engine.step(micro_batches, look)
            expected.step(gradients, result.learning_rate)
        mains = {name: main.values for name, main in engine.main_weights().items()}
        found = {
            name: mains.get(name, value).detach().view_as(value).double()
            for name, value in modules.named_parameters()
        }
    assert any(is_matrix_of_a_block(name, value) for name, value in before.items())
    for name, weight in expected.weights.items():
        if precision is Precision.fp32:
            assert (found[name] - weight).norm() < 1e-5 * weight.norm(), name
        else:
            moved = (weight - before[name]).norm()
            limit = 0.15 if is_matrix_of_a_block(name, weight) else 1e-3
            assert (found[name] - weight).norm() <= limit * moved, name


def test_layouts_train_as_one_process(tmp_path: Path) -> None:
    """Gathered over tensor-parallel ranks, on the stages of a pipeline, beside modules that are spread, and while gradients travel."""
    model = with_muon(configuration(MMDIT, recurrent=True))
    last = replace(model, recurrence=replace(RECURRENT, layers=[3]))
    one = run_on_ranks(1, {"model": model, "last": last, "dit": with_muon(MODELS["dit"])}, tmp_path)
    cases = {
        "model DP2": replace(model, parallel=layout(overlap_grad_reduce=True, bucket_size=5000)),
        "model TP2": replace(model, parallel=layout(tp=2)),
        "model CP2": replace(
            model, parallel=layout(cp=2), training=replace(model.training, recompute=Recompute.selective)
        ),
        "model PP2-interleaved": replace(model, parallel=layout(pp=2, vpp=2)),
        "model EP2": replace(model, parallel=layout(ep=2)),
        "last PP2": replace(last, parallel=layout(pp=2)),
        "dit TP2": replace(with_muon(MODELS["dit"]), parallel=layout(tp=2)),
    }
    for config in cases.values():
        validate(config, 2)
    for name, found in run_on_ranks(2, cases, tmp_path, partial(train, resumes=True)).items():
        assert_same_run(found, one[name.split()[0]], what=name)


@pytest.mark.distributed_full
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_as_one_process(name: str, tmp_path: Path) -> None:
    ranks, parallel = LAYOUTS[name]
    models = {kind: with_muon(MODELS[kind]) for kind in ("recurrent", "dit")}
    one = run_on_ranks(1, models, tmp_path)
    for kind, found in run_on_ranks(
        ranks, fitting(models, parallel), tmp_path, partial(train, resumes=True)
    ).items():
        assert_same_run(found, one[kind], what=f"{name} {kind}")


def test_a_resume_goes_on_to_the_bit(tmp_path: Path) -> None:
    """In bf16 that takes the float32 main weights, momentum, moments and their counters."""
    model = with_muon(configuration(MMDIT, recurrent=True))
    cases = {
        "DP2": replace(model, precision=Precision.bf16),
        "TP2": replace(model, precision=Precision.bf16, parallel=layout(tp=2)),
    }
    straight = run_on_ranks(2, cases, tmp_path, partial(train, gradients=False))
    for name, found in run_on_ranks(
        2, cases, tmp_path, partial(train, gradients=False, resumes=True)
    ).items():
        assert found.losses == straight[name].losses
        for kind in ("final", "averages"):
            for key, value in getattr(straight[name], kind).items():
                assert torch.equal(getattr(found, kind)[key], value), (name, key)


def test_a_resumed_optimizer_takes_the_momentum_of_its_configuration(tmp_path: Path) -> None:
    """One step after two: the buffers go on, and momentum and learning rate are the new ones."""
    first = with_muon(replace(tiny_config(), run_dir=str(tmp_path)), warmup_steps=0, clip_grad=1e9)
    second = replace(first, seed=1, optimizer=replace(first.optimizer, muon_momentum=0.5, learning_rate=0.02))
    gradients: list[dict[str, Tensor]] = []
    with one_rank(first):
        expected = Reference(first, dict(engine_of(first).modules.named_parameters()))
        for config, steps in ((first, 2), (second, 1)):
            engine = engine_of(config)
            state = TrainingState(engine, ExponentialMovingAverage(engine.parameters, 0.5), Progress(step=2))
            if config is second:
                load_checkpoint(state, list_checkpoints(tmp_path)[0])
                expected.weights = {
                    name: value.detach().double() for name, value in engine.modules.named_parameters()
                }
            expected.settings = config.optimizer
            for micro_batches in islice(batches(config), steps):

                def look(engine: MegatronEngine = engine) -> None:
                    gradients.append(
                        {name: each.main_grad.double() for name, each in engine.modules.named_parameters()}
                    )

                result = engine.step(micro_batches, look)
                expected.step(gradients[-1], result.learning_rate)
            if config is first:
                save_checkpoint(state, first, tmp_path)
    assert result.learning_rate == pytest.approx(0.02 * (1 + math.cos(math.pi * 2 / 20)) / 2)  # step 2 of 20
    for name, value in engine.modules.named_parameters():
        assert (value - expected.weights[name]).norm() < 1e-5 * expected.weights[name].norm(), name


def test_a_run_keeps_its_optimizer(tmp_path: Path) -> None:
    settings = [
        "training.steps=2",
        "training.sample_prompts=[]",
        "optimizer.warmup_steps=1",
        "data.validation=null",
    ]
    muon = ["optimizer.name=muon", "optimizer.distributed_optimizer=false"]
    run.train(load_config(make_run(tmp_path), [*settings, *muon]))
    code, errors = rmoe(
        "train", "--resume", str(tmp_path / "run"), "optimizer.name=adamw", "training.steps=3"
    )
    assert code == 2
    assert "was trained with optimizer.name=muon, which its state depends on" in errors
    code, errors = rmoe(
        "train", "--resume", str(tmp_path / "run"), "training.steps=3", "optimizer.muon_momentum=0.8"
    )
    assert code == 0, errors
    assert losses(tmp_path / "run").keys() == {1, 2, 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"distributed_optimizer": True}}, "set optimizer.distributed_optimizer=false"),
        ({"engine": EngineName.deepspeed}, "optimizer.name=muon is not for engine=deepspeed"),
        ({"precision": Precision.fp8_emulated}, "optimizer.name=muon is not for precision=fp8_emulated"),
        ({"recurrence": None, "lora": LoraConfig(layers=[1], rank=4)}, "optimizer.name=muon is not for lora"),
        ({"fine_tuning": FineTuningConfig("base", Trainable.added)}, "set fine_tuning.trainable=all"),
        ({"fine_tuning": FineTuningConfig("base", Trainable.blocks, [1])}, "set fine_tuning.trainable=all"),
        ({"training": {"compile": True}}, "optimizer.name=muon is not for training.compile=true"),
        ({"optimizer": {"name": OptimizerName.adamw}}, "optimizer.muon_momentum is for optimizer.name=muon"),
    ],
)
def test_what_is_not_proved_is_refused(changes: dict[str, Any], message: str) -> None:
    config = with_muon(tiny_config())
    validate(config, 1)
    changes = {
        key: replace(getattr(config, key), **value) if isinstance(value, dict) else value
        for key, value in changes.items()
    }
    with pytest.raises(UserError, match=message):
        validate(replace(config, **changes), 1)
