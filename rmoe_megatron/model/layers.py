"""Which of Megatron-Core's layers do the work inside the blocks."""

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from rmoe_megatron.model.attention import AttentionSubmodules


def core_attention() -> AttentionSubmodules:
    """Return what computes ``softmax(q k^T) v``."""
    return AttentionSubmodules(core_attention=DotProductAttention)


def mlp() -> ModuleSpec:
    """Return the MLP of one stream."""
    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(module=MLP, submodules=submodules)
