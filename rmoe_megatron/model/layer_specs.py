"""The layers of a pipeline stage: which block stands where, with which addition."""

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from rmoe_megatron.config.run import Recompute, RunConfig
from rmoe_megatron.model.block import BlockSettings
from rmoe_megatron.model.registry import addition_in, family_of


def stage_spec(
    config: RunConfig, transformer: TransformerConfig, pipeline_rank: int, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Return the specs of the layers of this pipeline stage; the final norm belongs to the model, not to the block.

    With the interleaved schedule they are those of model chunk ``vp_stage`` of the stage.
    """
    chunks = transformer.virtual_pipeline_model_parallel_size or 1
    layers_per_stage = transformer.num_layers // (transformer.pipeline_model_parallel_size * chunks)
    offset = get_transformer_layer_offset(transformer, vp_stage, pipeline_rank)
    layers = range(offset, offset + layers_per_stage)
    return TransformerBlockSubmodules(layer_specs=[block_spec(config, layer) for layer in layers])


def block_spec(config: RunConfig, layer: int) -> ModuleSpec:
    """Return the spec of block ``layer`` (from 0)."""
    model, added = config.model, addition_in(config, layer)
    settings = BlockSettings(
        qk_norm=model.qk_norm,
        mlp_norm_eps=model.mlp_norm_eps,
        seed=config.seed,
        text_length=model.text_length,
        recompute=config.training.recompute is Recompute.full,
        addition=added[0].name if added else None,
    )
    spec = family_of(config).block(model, layer, settings)
    if added is not None:
        addition, section = added
        spec.submodules.addition = addition.spec(section)
    return spec
