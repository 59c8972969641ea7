"""Which class does what in a block: Megatron-Core's own layers."""

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from rmoe_megatron.config.schema import RunConfig
from rmoe_megatron.model.blocks import JointBlock, JointBlockSubmodules
from rmoe_megatron.model.experts import Experts
from rmoe_megatron.model.joint_attention import JointAttention, JointAttentionSubmodules
from rmoe_megatron.model.recurrence import Recurrence, RecurrenceSubmodules


def block_spec(
    config: RunConfig, transformer: TransformerConfig, pipeline_rank: int
) -> TransformerBlockSubmodules:
    """Return the specs of the layers of this pipeline stage; the final norm belongs to the model, not to the block."""
    layers_per_stage = transformer.num_layers // transformer.pipeline_model_parallel_size
    offset = get_transformer_layer_offset(transformer, None, pipeline_rank)
    layers = range(offset, offset + layers_per_stage)
    return TransformerBlockSubmodules(layer_specs=[joint_block_spec(config, layer) for layer in layers])


def joint_block_spec(config: RunConfig, layer: int) -> ModuleSpec:
    """Return the spec of block ``layer`` (from 0)."""
    recurrence = config.recurrence if config.recurrence and layer in config.recurrence.layers else None
    return ModuleSpec(
        module=JointBlock,
        params={
            "text_length": config.model.text_length,
            "context_pre_only": layer == config.model.num_layers - 1,
            "qk_norm": config.model.qk_norm,
            "seed": config.seed,
            "recurrence": recurrence,
        },
        submodules=JointBlockSubmodules(
            attention=ModuleSpec(
                module=JointAttention, submodules=JointAttentionSubmodules(core_attention=DotProductAttention)
            ),
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            recurrence=ModuleSpec(module=Recurrence, submodules=RecurrenceSubmodules(experts=Experts))
            if recurrence
            else None,
        ),
    )
