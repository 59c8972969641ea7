"""The closed form of FLOPs against PyTorch's counter, which looks at every matrix product that is executed."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rmoe_megatron.config.model import Architecture, LoraConfig, ModelConfig
from rmoe_megatron.config.run import FineTuningConfig, RunConfig, Trainable
from rmoe_megatron.model.build import build_transformer
from rmoe_megatron.model.flops import forward_flops_per_sample, training_flops_per_sample
from rmoe_megatron.training.fine_tuning import freeze
from tests.support.configurations import MODEL, RECURRENCE, one_rank, randomise, tiny_config

DIT = ModelConfig(
    architecture=Architecture.dit, sample_size=8, patch_size=2, in_channels=3, num_layers=3, hidden_size=32,
    num_attention_heads=2, qk_norm=False, num_classes=7, learned_sigma=True,
)  # fmt: skip
CASES = {
    "mmdit": tiny_config(None),
    "dual-attention": tiny_config(None, model=replace(MODEL, dual_attention_layers=[0, 1])),
    "dit": tiny_config(None, model=DIT),
    "lora": tiny_config(None, lora=LoraConfig(layers=[1], rank=4)),
}
BATCH = 2


def run(config: RunConfig, model: torch.nn.Module) -> torch.Tensor:
    conditions = {"text_hidden_states": torch.randn(BATCH, 5, 12), "text_pooled": torch.randn(BATCH, 10)}
    if config.model.architecture is Architecture.dit:
        conditions = {"class_labels": torch.tensor([1, 2])}
    latents = torch.randn(BATCH, 3, 8, 8)
    with sdpa_kernel(SDPBackend.MATH):  # the counter does not know the CPU's fused kernel
        return model(latents, torch.tensor([5.0, 500.0]), torch.arange(BATCH), **conditions)


@pytest.mark.parametrize("name", CASES)
def test_forward_equals_the_counter(name: str) -> None:
    config = CASES[name]
    with one_rank(config), torch.no_grad():
        model = build_transformer(config)
        with FlopCounterMode(display=False) as counter:
            run(config, model)
    assert forward_flops_per_sample(config) == pytest.approx(counter.get_total_flops() / BATCH, rel=1e-3)


@pytest.mark.parametrize("blocks", [[0, 1, 2], [1], [2]])
def test_training_with_frozen_blocks_is_close_to_the_counter(blocks: list[int]) -> None:
    fine_tuning = FineTuningConfig(base="", trainable=Trainable.blocks, blocks=blocks)
    config = replace(CASES["mmdit"], fine_tuning=fine_tuning)
    with one_rank(config):
        model = build_transformer(config)
        randomise(model)
        freeze(model, fine_tuning)
        with FlopCounterMode(display=False) as counter:
            run(config, model).sum().backward()
    assert training_flops_per_sample(config) == pytest.approx(counter.get_total_flops() / BATCH, rel=0.05)


@pytest.mark.parametrize(
    ("blocks", "factors"), [([1], (3, 2)), ([2], (1, 3)), ([1, 2], (3, 3)), ([0], (2, 2))]
)
def test_frozen_modules_cost_their_forward_pass_and_the_way_back_to_what_is_trained(
    blocks: list[int], factors: tuple[int, int]
) -> None:
    """Modules in blocks 1 and 2 multiply as much as each other: once forward, once for inputs, once for weights."""
    fine_tuning = FineTuningConfig(base="", trainable=Trainable.blocks, blocks=blocks)
    with_modules, without = (
        replace(tiny_config(recurrence), fine_tuning=fine_tuning) for recurrence in (RECURRENCE, None)
    )
    one_block = (forward_flops_per_sample(with_modules) - forward_flops_per_sample(without)) / 2
    assert one_block > 0
    found = training_flops_per_sample(with_modules) - training_flops_per_sample(without)
    assert found == pytest.approx(sum(factors) * one_block, rel=1e-9)
