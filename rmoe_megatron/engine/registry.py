"""Which engines there are: the one place where a new one is named."""

from torch import nn

from rmoe_megatron.config.run import EngineName, RunConfig
from rmoe_megatron.diffusion.loss import DiffusionLoss
from rmoe_megatron.engine.protocol import Engine


def build_engine(config: RunConfig, modules: nn.ModuleList, loss: DiffusionLoss) -> Engine:
    """Return the engine that trains ``modules``: this rank's part of the model, on its device, frozen where it is."""
    # Each is imported where it is used: DeepSpeed may not be installed.
    if config.engine is EngineName.deepspeed:
        from rmoe_megatron.engine.deepspeed.engine import DeepSpeedEngine

        return DeepSpeedEngine(config, modules, loss)
    from rmoe_megatron.engine.megatron.engine import MegatronEngine

    return MegatronEngine(config, modules, loss)
