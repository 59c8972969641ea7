"""The histories that delayed scaling takes its scales from, as part of a checkpoint."""

from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor, nn

from rmoe_megatron.checkpoint.model_state import full_state
from rmoe_megatron.model.precision.rounding import DelayedScaling

WEIGHT = ".weight"


def sharded_scales(chunks: nn.ModuleList) -> dict[str, ShardedTensor]:
    """Describe the histories of this rank's layers, which all ranks of its pipeline stage hold alike.

    Keys are those of the layers in the whole model, under ``fp8.``: any layout can load them.
    """
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    layers = dict(chunks.named_modules())
    state = {}
    for name, entry in full_state(chunks).items():
        recipe = getattr(layers.get(name.removesuffix(WEIGHT)), "recipe", None)
        if name.endswith(WEIGHT) and isinstance(recipe, DelayedScaling):
            key = f"fp8.{entry.key.removesuffix(WEIGHT)}.amax_history"
            state[name] = ShardedTensor.from_rank_offsets(
                key, recipe.amax_history, replica_id=(0, 0, replica)
            )
    return state


def load_scales(chunks: nn.ModuleList, loaded: dict[str, Tensor]) -> None:
    """Take over histories under the names of :func:`sharded_scales`."""
    layers = dict(chunks.named_modules())
    for name, history in loaded.items():
        layers[name.removesuffix(WEIGHT)].recipe.amax_history.copy_(history)
