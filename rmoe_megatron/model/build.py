"""From a configuration to its model."""

from typing import Any

from megatron.core import parallel_state
from torch import nn

from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.model.diffusion_transformer import DiffusionTransformer
from rmoe_megatron.model.registry import family_of


def build_transformer(config: RunConfig, **arguments: Any) -> DiffusionTransformer:
    """Return a model or a part of one; arguments are those of :class:`DiffusionTransformer`."""
    return family_of(config).transformer()(config, **arguments)


def build_chunks(config: RunConfig, initialise: bool = True) -> nn.ModuleList:
    """Return what this pipeline stage has of the model: one chunk, or with the interleaved schedule several."""
    virtual = config.parallel.virtual_pipeline_model_parallel_size
    return nn.ModuleList(
        build_transformer(
            config,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            initialise=initialise,
            vp_stage=vp_stage,
        )
        for vp_stage in (range(virtual) if virtual > 1 else [None])
    )
