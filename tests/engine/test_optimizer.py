"""The update of an engine's step against AdamW written out in float64, and whose kernel takes it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rmoe_megatron.diffusion.loss import DiffusionLoss
from rmoe_megatron.engine.megatron.engine import MegatronEngine
from rmoe_megatron.engine.megatron.optimizer import _adam_optimizers
from rmoe_megatron.model.build import build_chunks
from tests.model.test_compile import make_batch
from tests.support.configurations import one_rank, randomise, tiny_config

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
