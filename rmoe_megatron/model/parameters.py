"""Number of parameters of a model in closed form."""

from rmoe_megatron.config.model import ModelDescription
from rmoe_megatron.model.family import linear_parameters
from rmoe_megatron.model.registry import adapters_of, family_of


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
