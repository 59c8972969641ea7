"""Number of parameters of a model in closed form, and what they take in memory at least."""

from rmoe_megatron.config.model import ModelDescription
from rmoe_megatron.config.run import EngineName, RunConfig, Trainable
from rmoe_megatron.errors import UserError
from rmoe_megatron.model.family import linear_parameters
from rmoe_megatron.model.registry import adapters_of, family_of

GRADIENT_BYTES = 4  # gradients are reduced in float32


def dense_parameters(description: ModelDescription) -> int:
    """Return the number of parameters of the model without the experts of its recurrence."""
    family, model, hidden = family_of(description), description.model, description.model.hidden_size
    patch = model.patch_size**2 * model.in_channels
    outputs = patch * (2 if model.learned_sigma else 1)
    ends = linear_parameters(patch, hidden) + linear_parameters(hidden, 2 * hidden)
    ends += linear_parameters(hidden, outputs)
    blocks = sum(family.block_parameters(model, layer) for layer in range(model.num_layers))
    added = sum(
        len(section.layers) * adapter.parameters(model, section)
        for adapter, section in adapters_of(description)
    )
    recall = 2 * 2 * hidden**2 if description.loop is not None and description.loop.recall else 0
    return family.conditioning_parameters(model) + ends + blocks + added + recall


def expert_parameters(description: ModelDescription) -> int:
    """Return the number of parameters of all experts of the recurrence, which expert parallelism spreads."""
    return sum(
        len(section.layers) * adapter.expert_parameters(description.model, section)
        for adapter, section in adapters_of(description)
    )


def check_memory(config: RunConfig, bytes_per_rank: int, where: str) -> None:
    """Check that the parameters of a rank and the gradients of what is trained can fit into its memory at all.

    What is counted is less than a run needs: activations, averages and the optimizer's state come on top.

    Args:
        bytes_per_rank: memory of the device, divided by the ranks that share it.
        where: what the error message calls this memory.

    Raises:
        UserError: they cannot.
    """
    parallel = config.parallel
    dense, experts = dense_parameters(config), expert_parameters(config)
    shards = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    spread = parallel.expert_model_parallel_size * parallel.pipeline_model_parallel_size
    trains_all = config.fine_tuning is None or config.fine_tuning.trainable is Trainable.all
    shards_gradients = config.engine is EngineName.deepspeed and config.deepspeed.zero_stage > 1
    has_gradients = trains_all and not shards_gradients
    # ZeRO's third stage shards parameters, but builds them whole first.
    bytes_each = config.precision.parameter_bytes + (GRADIENT_BYTES if has_gradients else 0)
    needed = (dense // shards + experts // spread) * bytes_each
    if needed > bytes_per_rank:
        raise UserError(
            f"The model has {dense + experts:.3g} parameters, which take at least {needed / 1e9:.4g} GB on a rank of this "
            f"layout, but {where} has {bytes_per_rank / 1e9:.4g} GB for it; choose a smaller model or a layout that spreads "
            "it over more ranks."
        )
