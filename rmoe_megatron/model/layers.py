"""Which layers do the work inside the blocks: Megatron-Core's, and attention that keeps no scores."""

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from rmoe_megatron.model.attention import AttentionSubmodules
from rmoe_megatron.model.core_attention import ScaledDotProductAttention


def core_attention() -> AttentionSubmodules:
    """Return what computes ``softmax(q k^T) v``."""
    return AttentionSubmodules(core_attention=ScaledDotProductAttention)


def mlp() -> ModuleSpec:
    """Return the MLP of one stream."""
    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(module=MLP, submodules=submodules)
