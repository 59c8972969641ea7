"""From a configuration to its model."""

from typing import Any

from rmoe_megatron.config.schema import Architecture, RunConfig
from rmoe_megatron.model.diffusion_transformer import DiffusionTransformer
from rmoe_megatron.model.dit import DiT
from rmoe_megatron.model.mmdit import MMDiT

MODEL_CLASSES: dict[Architecture, type[DiffusionTransformer]] = {
    Architecture.mmdit: MMDiT,
    Architecture.dit: DiT,
}


def build_transformer(config: RunConfig, **arguments: Any) -> DiffusionTransformer:
    """Return the model of this pipeline stage; arguments are those of :class:`DiffusionTransformer`."""
    return MODEL_CLASSES[config.model.architecture](config, **arguments)
