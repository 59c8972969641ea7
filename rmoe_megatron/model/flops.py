"""Floating-point operations of a model in closed form: matrix products only, two per multiply-add."""

from rmoe_megatron.config.model import ModelConfig, ModelDescription
from rmoe_megatron.config.run import RunConfig, Trainable
from rmoe_megatron.model.family import vision_tokens
from rmoe_megatron.model.registry import addition_in, family_of


def training_flops_per_sample(config: RunConfig, vision: int | None = None) -> float:
    """Return FLOPs of forward and backward of one image.

    The backward pass costs two forward passes: gradients of the inputs and of the weights. Weights that are frozen
    save the second; blocks before the first trained one save both.

    Args:
        vision: tokens of the image; None takes a square of the model's size.
    """
    vision = vision_tokens(config.model) if vision is None else vision
    fine_tuning, layers = config.fine_tuning, range(config.model.num_layers)
    if fine_tuning is None or fine_tuning.trainable is Trainable.all:
        return 3 * forward_flops_per_sample(config, vision)
    if fine_tuning.trainable is Trainable.added:
        trained = {layer for layer in layers if addition_in(config, layer)}
    else:
        trained = set(fine_tuning.blocks)
    total = outer_multiply_adds(config, vision) * 2
    for layer in layers:
        base = family_of(config).block_multiply_adds(config.model, layer, vision)
        added = added_multiply_adds(config, layer, vision)
        total += (base + added) * (2 if layer >= min(trained) else 1)
        if layer in trained:
            total += added + (base if fine_tuning.trainable is Trainable.blocks else 0)
    return 2 * total


def forward_flops_per_sample(description: ModelDescription, vision: int | None = None) -> float:
    """Return FLOPs of one forward pass of one image of ``vision`` tokens; None is a square of the model's size."""
    family, model = family_of(description), description.model
    vision = vision_tokens(model) if vision is None else vision
    blocks = sum(
        family.block_multiply_adds(model, layer, vision) + added_multiply_adds(description, layer, vision)
        for layer in range(model.num_layers)
    )
    return 2 * (outer_multiply_adds(description, vision) + blocks)


def outer_multiply_adds(description: ModelDescription, vision: int) -> float:
    """Return multiply-adds of embeddings and output projection."""
    model, hidden = description.model, description.model.hidden_size
    embedding = vision * _patch(model) * hidden + family_of(description).conditioning_multiply_adds(model)
    return embedding + vision * _patch(model) * hidden * (2 if model.learned_sigma else 1) + 2 * hidden**2


def added_multiply_adds(description: ModelDescription, layer: int, vision: int) -> float:
    """Return what is added to block ``layer``."""
    added = addition_in(description, layer)
    return 0 if added is None else added[0].multiply_adds(description.model, added[1], vision)


def _patch(model: ModelConfig) -> int:
    return model.patch_size**2 * model.in_channels
