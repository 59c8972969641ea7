"""Which layers do the work inside the blocks: Megatron-Core's, Transformer Engine's, or emulations of low precision."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec

from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.model.attention import AttentionSubmodules
from rmoe_megatron.model.core_attention import ScaledDotProductAttention
from rmoe_megatron.model.precision.backend import uses_transformer_engine
from rmoe_megatron.model.precision.emulated_linear import (
    EmulatedColumnParallelLinear,
    EmulatedExperts,
    EmulatedRowParallelLinear,
)
from rmoe_megatron.model.precision.linear import ColumnParallelLinear, RowParallelLinear
from rmoe_megatron.model.precision.rounding import DelayedScaling, make_recipe
from rmoe_megatron.model.recurrence.experts import Experts


@dataclass(frozen=True)
class Layers:
    """What makes layers with the interfaces of Megatron-Core's; blocks are built of them.

    Attributes:
        column_parallel_linear: a rank has rows of the weight: projections to queries, keys and values, first layer of the MLP.
        row_parallel_linear: a rank has columns of the weight: output projections, second layer of the MLP.
        core_attention: ``softmax(q k^T) v``.
        experts: the experts of a recurrence.
    """

    column_parallel_linear: Callable[..., MegatronModule]
    row_parallel_linear: Callable[..., MegatronModule]
    core_attention: Callable[..., MegatronModule] = ScaledDotProductAttention
    experts: Callable[..., Experts] = Experts

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


LOCAL = Layers(ColumnParallelLinear, RowParallelLinear)


def layers_of(config: RunConfig, layer: int) -> Layers:
    """Return what block ``layer`` (from 0) is built of.

    Transformer Engine's layers are in FP8 where Megatron-Core's TransformerBlock says so; emulated ones know it themselves.
    """
    if uses_transformer_engine(config):
        # Imports the whole of Transformer Engine.
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

        return Layers(TEColumnParallelLinear, TERowParallelLinear)
    first = config.fp8.num_layers_at_start_in_bf16
    last = config.model.num_layers - config.fp8.num_layers_at_end_in_bf16
    if not config.precision.is_emulated or not first <= layer < last:
        return LOCAL
    recipe = partial(make_recipe, config)
    layers = Layers(
        partial(EmulatedColumnParallelLinear, recipe=recipe),
        partial(EmulatedRowParallelLinear, recipe=recipe),
    )
    shared = recipe()
    # The tokens that an expert gets change from call to call, so a history of largest values does not predict the next scale;
    # delayed scaling leaves experts in bf16.
    if isinstance(shared, DelayedScaling):
        return layers
    return replace(layers, experts=partial(EmulatedExperts, recipe=shared))
