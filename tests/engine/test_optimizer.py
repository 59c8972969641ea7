"""The update of an engine's step against AdamW written out in float64, and whose kernel takes it."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rmoe_megatron.checkpoint.folders import list_checkpoints
from rmoe_megatron.checkpoint.run_checkpoint import Progress, load_checkpoint, save_checkpoint
from rmoe_megatron.data.batch import ClassConditions, Conditions
from rmoe_megatron.diffusion.loss import DiffusionLoss
from rmoe_megatron.engine.deepspeed.expert_groups import mark_experts
from rmoe_megatron.engine.deepspeed.optimizer import build_adam
from rmoe_megatron.engine.megatron.engine import MegatronEngine
from rmoe_megatron.engine.megatron.optimizer import _adam_optimizers
from rmoe_megatron.model.build import build_chunks
from rmoe_megatron.training.ema import ExponentialMovingAverage
from rmoe_megatron.training.state import TrainingState
from tests.model.test_compile import make_batch
from tests.support.configurations import one_rank, randomise, tiny_config
from tests.support.ranks import DIT

STEPS = 4


@pytest.mark.parametrize(("distributed", "clip_grad"), [(True, 0.5), (False, 0.5), (True, 0.0), (False, 0.0)])
def test_steps_are_those_of_adamw(distributed: bool, clip_grad: float) -> None:
    """Gradients are clipped to a norm, or by 0 not at all."""
    config = tiny_config()
    settings = replace(
        config.optimizer, weight_decay=0.1, clip_grad=clip_grad, warmup_steps=2, min_learning_rate=1e-4,
        distributed_optimizer=distributed,
    )  # fmt: skip
    config = replace(config, optimizer=settings)
    with one_rank(config):
        modules = build_chunks(config)
        randomise(modules)
        null = make_batch(0).conditions.map(lambda tensor: tensor[:1])
        engine = MegatronEngine(config, modules, DiffusionLoss(config, config.seed, null))
        weights = {name: value.detach().double() for name, value in modules.named_parameters()}
        moments = {
            name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in weights.items()
        }
        decayed = {
            name
            for name, value in modules.named_parameters()
            if value.dim() > 1 and not name.endswith(".bias")
        }
        for step in range(1, STEPS + 1):
            gradients: dict[str, Tensor] = {}

            def look(gradients: dict[str, Tensor] = gradients) -> None:
                gradients |= {name: each.main_grad.double() for name, each in modules.named_parameters()}

            result = engine.step([make_batch(step)], look)
            norm = torch.stack([each.norm() for each in gradients.values()]).norm().item()
            assert result.grad_norm == pytest.approx(norm, rel=1e-5)
            scale = min(1.0, clip_grad / (norm + 1e-6)) if clip_grad else 1.0
            for name, weight in weights.items():
                gradient, (first, second) = gradients[name] * scale, moments[name]
                first.lerp_(gradient, 1 - settings.beta1)
                second.lerp_(gradient**2, 1 - settings.beta2)
                unbiased = (second / (1 - settings.beta2**step)).sqrt() + settings.eps
                weight *= 1 - result.learning_rate * (settings.weight_decay if name in decayed else 0)
                weight -= result.learning_rate * (first / (1 - settings.beta1**step)) / unbiased
        for name, value in modules.named_parameters():
            assert (value - weights[name]).norm() < 1e-5 * weights[name].norm(), name
        optimizers = _adam_optimizers(engine.optimizer)
        assert len(optimizers) >= 1
        assert all(group["fused"] for adam in optimizers for group in adam.param_groups)


DECAYS = {
    # By kind of parameter, in the words of its name; what no word is in is neither a vector nor a bias.
    "mmdit": [
        "recurrence.gate.weight", "recurrence.gate.conditioning_weight", "experts.down", "experts.up", "pos_embed.proj.weight",
        "context_embedder.weight", "timestep_embedder.linear_1.weight", "text_embedder.linear_2.weight", "modulation_out.linear.weight",
        "proj_out.weight", "linear_qkv.weight", "mlp_context.linear_fc1.weight",
    ],
    "dit": ["class_embedder.embedding_table.weight", "timestep_embedder.linear_1.weight", "proj_out.weight"],
}  # fmt: skip
STAYS = {
    "mmdit": [
        "linear_qkv.bias",
        "qk_norm.query_weight",
        "qk_norm_context.key_weight",
        "context_embedder.bias",
        "proj_out.bias",
    ],
    "dit": ["timestep_embedder.linear_1.bias", "proj_out.bias"],
}


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_what_decays_has_these_names(kind: str, engine: str) -> None:
    config = tiny_config() if kind == "mmdit" else tiny_config(None, model=DIT)
    config = replace(config, optimizer=replace(config.optimizer, weight_decay=0.1))
    with one_rank(config):
        modules = build_chunks(config)
        names = {id(parameter): name for name, parameter in modules.named_parameters()}
        if engine == "deepspeed":
            mark_experts(modules.parameters(), 1)
            groups = build_adam(config, dict(modules.named_parameters())).param_groups
        else:
            config = replace(config, optimizer=replace(config.optimizer, distributed_optimizer=False))
            groups = MegatronEngine(
                config, modules, DiffusionLoss(config, 0, null_of(kind))
            ).optimizer.param_groups
        decay = {names[id(parameter)]: group["wd_mult"] for group in groups for parameter in group["params"]}
    assert decay.keys() == set(names.values())
    for expected, endings in ((1.0, DECAYS[kind]), (0.0, STAYS[kind])):
        for ending in endings:
            found = {name: value for name, value in decay.items() if name.endswith(ending)}
            assert found, f"no parameter is called {ending}"
            assert set(found.values()) == {expected}, ending


def null_of(kind: str) -> Conditions:
    return (
        make_batch(0).conditions.map(lambda tensor: tensor[:1])
        if kind == "mmdit"
        else ClassConditions(torch.tensor([7]))
    )


def test_a_resumed_optimizer_takes_the_rates_of_its_configuration_and_the_moments_of_its_checkpoint(
    tmp_path: Path,
) -> None:
    """One more step after two: betas, eps and learning rate are the new ones, moments and the number of steps go on."""
    first = tiny_config()
    first = replace(
        first,
        run_dir=str(tmp_path),
        optimizer=replace(first.optimizer, warmup_steps=0, clip_grad=0.0, weight_decay=0.0),
    )
    second = replace(
        first,
        optimizer=replace(first.optimizer, beta1=0.5, beta2=0.8, eps=1e-3, learning_rate=0.02),
        seed=first.seed + 1,
    )
    gradients: list[dict[str, Tensor]] = []
    with one_rank(first):
        for config, steps in ((first, 2), (second, 1)):
            modules = build_chunks(config)
            randomise(modules, seed=config.seed)
            engine = MegatronEngine(config, modules, DiffusionLoss(config, 0, null_of("mmdit")))
            state = TrainingState(engine, ExponentialMovingAverage(engine.parameters, 0.5), Progress(step=2))
            if config is second:
                load_checkpoint(state, list_checkpoints(tmp_path)[0])
                before = {name: value.detach().double() for name, value in modules.named_parameters()}
            for _ in range(steps):

                def look(modules: torch.nn.Module = modules) -> None:
                    gradients.append(
                        {name: each.main_grad.double() for name, each in modules.named_parameters()}
                    )

                result = engine.step([make_batch(len(gradients))], look)
            if config is first:
                save_checkpoint(state, first, tmp_path)
    assert result.learning_rate == pytest.approx(0.02 * (1 + math.cos(math.pi * 2 / 20)) / 2)  # step 2 of 20
    old, new = first.optimizer, second.optimizer
    for name, value in modules.named_parameters():
        moment, square = torch.zeros_like(before[name]), torch.zeros_like(before[name])
        for number, settings in enumerate((old, old, new)):
            moment = settings.beta1 * moment + (1 - settings.beta1) * gradients[number][name]
            square = settings.beta2 * square + (1 - settings.beta2) * gradients[number][name] ** 2
        unbiased = (square / (1 - new.beta2**3)).sqrt() + new.eps
        expected = before[name] - result.learning_rate * moment / (1 - new.beta1**3) / unbiased
        assert (value - expected).norm() < 1e-5 * expected.norm(), name


def test_what_is_frozen_is_no_parameter_to_be_averaged() -> None:
    config = tiny_config()
    with one_rank(config):
        modules = build_chunks(config)
        frozen = {name for name, _ in modules.named_parameters() if ".experts." not in name}
        for name, parameter in modules.named_parameters():
            parameter.requires_grad_(name not in frozen)
        null = make_batch(0).conditions.map(lambda tensor: tensor[:1])
        engine = MegatronEngine(config, modules, DiffusionLoss(config, config.seed, null))
        assert engine.parameters.keys() == dict(modules.named_parameters()).keys() - frozen
        assert len(engine.parameters) > 0
