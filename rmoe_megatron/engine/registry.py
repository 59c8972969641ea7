"""Which engines there are: the one place where a new one is named."""

from torch import nn

from rmoe_megatron.config.run import EngineName, RunConfig
from rmoe_megatron.diffusion.loss import DiffusionLoss
from rmoe_megatron.engine.deepspeed.kind import DeepSpeedKind
from rmoe_megatron.engine.kind import EngineKind
from rmoe_megatron.engine.megatron.kind import MegatronKind
from rmoe_megatron.engine.protocol import Engine

ENGINES: dict[EngineName, EngineKind] = {
    EngineName.megatron: MegatronKind(),
    EngineName.deepspeed: DeepSpeedKind(),
}


def engine_of(config: RunConfig) -> EngineKind:
    """Return the kind of engine that a run has."""
    return ENGINES[config.engine]


def build_engine(config: RunConfig, modules: nn.ModuleList, loss: DiffusionLoss) -> Engine:
    """Return the engine that trains ``modules``: this rank's part of the model, on its device, frozen where it is."""
    return engine_of(config).build(config, modules, loss)
