"""The layers of a pipeline stage: which block stands where, with which adapter."""

from collections.abc import Callable

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from rmoe_megatron.config.model import ModelConfig
from rmoe_megatron.config.run import Recompute, RunConfig
from rmoe_megatron.model.block import BlockSettings
from rmoe_megatron.model.precision.layers import Layers, layers_of
from rmoe_megatron.model.registry import adapter_in

# Makes class, parts and settings of a family's block without what is added to it, of the model, the block's number (from 0),
# what is the same in all families, and the layers to build it of.
BlockSpec = Callable[[ModelConfig, int, BlockSettings, Layers], ModuleSpec]


def stage_spec(
    config: RunConfig,
    block: BlockSpec,
    transformer: TransformerConfig,
    pipeline_rank: int,
    vp_stage: int | None,
) -> TransformerBlockSubmodules:
    """Return the specs of the layers of this pipeline stage; the final norm belongs to the model, not to the block.

    With the interleaved schedule they are those of model chunk ``vp_stage`` of the stage.
    """
    chunks = transformer.virtual_pipeline_model_parallel_size or 1
    layers_per_stage = transformer.num_layers // (transformer.pipeline_model_parallel_size * chunks)
    offset = get_transformer_layer_offset(transformer, vp_stage, pipeline_rank)
    layers = range(offset, offset + layers_per_stage)
    return TransformerBlockSubmodules(layer_specs=[block_spec(config, block, layer) for layer in layers])


def block_spec(config: RunConfig, block: BlockSpec, layer: int) -> ModuleSpec:
    """Return the spec of block ``layer`` (from 0)."""
    model, added = config.model, adapter_in(config, layer)
    settings = BlockSettings(
        qk_norm=model.qk_norm,
        mlp_norm_eps=model.mlp_norm_eps,
        seed=config.seed,
        text_length=model.text_length,
        recompute=config.training.recompute is Recompute.full,
        compile=config.training.compile,
        exclusive_attention=model.exclusive_attention,
        adapter=added[0].name if added else None,
    )
    layers = layers_of(config, layer)
    spec = block(model, layer, settings, layers)
    if added is not None:
        adapter, section = added
        spec.submodules.adapter = adapter.spec(section, layers)
    return spec
