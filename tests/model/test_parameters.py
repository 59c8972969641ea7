"""The closed form of the number of parameters against models that are built."""

from dataclasses import replace

import pytest

from rmoe_megatron.config.model import LoopConfig
from rmoe_megatron.config.run import DeepSpeedConfig, EngineName, FineTuningConfig, ParallelConfig
from rmoe_megatron.errors import UserError
from rmoe_megatron.model.build import build_transformer
from rmoe_megatron.model.parameters import dense_parameters, expert_parameters
from rmoe_megatron.training.preflight import check_memory
from tests.model.test_flops import CASES, DIT
from tests.support.configurations import RECURRENCE, one_rank, tiny_config

MODELS = CASES | {
    "no QK norm": tiny_config(None, model=replace(tiny_config().model, qk_norm=False)),
    "conditioning in every block": tiny_config(None, model=replace(DIT, shared_conditioning=False)),
    "recurrence": tiny_config(),
    "full rank": tiny_config(replace(RECURRENCE, rank=None, modulation=False)),
    "loop": tiny_config(None, loop=LoopConfig(first=0, last=1)),
    "one gate input": tiny_config(replace(RECURRENCE, layers=[0], gate_inputs=["tokens"]), model=DIT),
}


@pytest.mark.parametrize("name", MODELS)
def test_closed_form_equals_the_model(name: str) -> None:
    config = MODELS[name]
    with one_rank(config):
        parameters = dict(build_transformer(config).named_parameters())
    modules = sum(values.numel() for key, values in parameters.items() if ".experts." in key)
    total = sum(values.numel() for values in parameters.values())
    assert (dense_parameters(config), expert_parameters(config)) == (total - modules, modules)


def test_a_model_that_cannot_fit_is_refused() -> None:
    config = tiny_config()
    whole = 8 * (dense_parameters(config) + expert_parameters(config))  # float32 weights and gradients
    check_memory(config, whole, "the CPU")
    with pytest.raises(UserError, match="choose a smaller model or a layout"):
        check_memory(config, whole - 8, "the CPU")
    spread = replace(config, parallel=ParallelConfig(pipeline_model_parallel_size=3))
    check_memory(spread, whole // 3, "the CPU")
    # ZeRO's second stage leaves a rank without whole gradients.
    zero = replace(config, engine=EngineName.deepspeed, deepspeed=DeepSpeedConfig(zero_stage=2))
    check_memory(zero, whole // 2, "the CPU")
    with pytest.raises(UserError):
        check_memory(zero, whole // 2 - 8, "the CPU")
    frozen = replace(config, fine_tuning=FineTuningConfig(base="x"))
    check_memory(frozen, whole // 2, "the CPU")
