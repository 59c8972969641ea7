"""Which layers do the work inside the blocks: Megatron-Core's, and attention that keeps no scores."""

from dataclasses import dataclass

from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from rmoe_megatron.model.attention import AttentionSubmodules
from rmoe_megatron.model.core_attention import ScaledDotProductAttention
from rmoe_megatron.model.linear import ColumnParallelLinear, RowParallelLinear


@dataclass(frozen=True)
class Layers:
    """Classes with the interfaces of Megatron-Core's layers; blocks are built of them.

    Attributes:
        column_parallel_linear: a rank has rows of the weight: projections to queries, keys and values, first layer of the MLP.
        row_parallel_linear: a rank has columns of the weight: output projections, second layer of the MLP.
        core_attention: ``softmax(q k^T) v``.
    """

    column_parallel_linear: type
    row_parallel_linear: type
    core_attention: type

    def attention(self) -> AttentionSubmodules:
        """Return the layers of an attention."""
        return AttentionSubmodules(
            linear_qkv=self.column_parallel_linear,
            linear_proj=self.row_parallel_linear,
            core_attention=self.core_attention,
        )

    def mlp(self) -> ModuleSpec:
        """Return the MLP of one stream."""
        submodules = MLPSubmodules(
            linear_fc1=self.column_parallel_linear, linear_fc2=self.row_parallel_linear
        )
        return ModuleSpec(module=MLP, submodules=submodules)


LOCAL = Layers(ColumnParallelLinear, RowParallelLinear, ScaledDotProductAttention)
