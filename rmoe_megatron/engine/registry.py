"""Which engines there are: the one place where a new one is named."""

from torch import nn

from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.diffusion.loss import DiffusionLoss
from rmoe_megatron.engine.megatron.engine import MegatronEngine
from rmoe_megatron.engine.protocol import Engine


def build_engine(config: RunConfig, modules: nn.ModuleList, loss: DiffusionLoss) -> Engine:
    """Return the engine that trains ``modules``: this rank's part of the model, on its device, frozen where it is."""
    return MegatronEngine(config, modules, loss)
