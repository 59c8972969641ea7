"""Which class does what in a block: Megatron-Core's own layers."""

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from rmoe_megatron.config.model import Architecture
from rmoe_megatron.config.run import Recompute, RunConfig
from rmoe_megatron.model.attention import AttentionSubmodules, JointAttention, SelfAttention
from rmoe_megatron.model.blocks import BlockSettings, BlockSubmodules, DiTBlock, JointBlock
from rmoe_megatron.model.experts import Experts
from rmoe_megatron.model.lora import Lora
from rmoe_megatron.model.recurrence import Recurrence, RecurrenceSubmodules


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
    model, is_joint = config.model, config.model.architecture is Architecture.mmdit
    recurrence = config.recurrence if config.recurrence and layer in config.recurrence.layers else None
    lora = config.lora if config.lora and layer in config.lora.layers else None
    settings = BlockSettings(
        qk_norm=model.qk_norm,
        mlp_norm_eps=model.mlp_norm_eps,
        seed=config.seed,
        text_length=model.text_length,
        context_pre_only=is_joint and layer == model.num_layers - 1,
        recompute=config.training.recompute is Recompute.full,
        recurrence=recurrence,
        lora=lora,
    )
    core = AttentionSubmodules(core_attention=DotProductAttention)
    submodules = BlockSubmodules(
        attention=ModuleSpec(module=JointAttention if is_joint else SelfAttention, submodules=core),
        mlp=ModuleSpec(
            module=MLP,
            submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        ),
        dual_attention=ModuleSpec(module=SelfAttention, submodules=core)
        if layer in model.dual_attention_layers
        else None,
        recurrence=ModuleSpec(module=Recurrence, submodules=RecurrenceSubmodules(experts=Experts))
        if recurrence
        else None,
        lora=ModuleSpec(module=Lora) if lora else None,
    )
    block = JointBlock if is_joint else DiTBlock
    return ModuleSpec(module=block, params={"settings": settings}, submodules=submodules)
