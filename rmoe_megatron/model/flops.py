"""Floating-point operations of a model in closed form: matrix products only, two per multiply-add."""

from dataclasses import replace

from rmoe_megatron.config.model import DepthLoss, ModelConfig, ModelDescription
from rmoe_megatron.config.run import RunConfig, Trainable
from rmoe_megatron.model.family import vision_tokens
from rmoe_megatron.model.registry import adapter_in, depth_of, family_of


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
        return 2 * 3 * _training_multiply_adds(config, vision)
    if fine_tuning.trainable is Trainable.added:
        trained = {layer for layer in layers if adapter_in(config, layer)}
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
    model = description.model
    vision = vision_tokens(model) if vision is None else vision
    looped = (
        range(0) if description.loop is None else range(description.loop.first, description.loop.last + 1)
    )
    passes = 1 if description.loop is None else description.loop.times
    blocks = sum(
        _block_multiply_adds(description, layer, vision) * (passes if layer in looped else 1)
        for layer in range(model.num_layers)
    )
    return 2 * (outer_multiply_adds(description, vision) + blocks + passes * _recall(description, vision))


def _training_multiply_adds(config: RunConfig, vision: int) -> float:
    """Return multiply-adds of one forward pass of training, which may decode several depths."""
    once = forward_flops_per_sample(config, vision) / 2
    depth_loss, loop, layers = config.diffusion.depth_loss, config.loop, range(config.model.num_layers)
    if depth_loss is DepthLoss.last or depth_of(config) == 1:
        return once
    if loop is not None:
        others = 1 if depth_loss is DepthLoss.drawn else loop.times - 1
        after = sum(_block_multiply_adds(config, layer, vision) for layer in layers if layer > loop.last)
        return once + others * (after + _output_multiply_adds(config, vision))
    assert config.recurrence is not None
    for steps in range(1, config.recurrence.steps):
        shallower = replace(config, recurrence=replace(config.recurrence, steps=steps))
        once += _output_multiply_adds(config, vision)
        once += sum(
            _block_multiply_adds(shallower, layer, vision)
            for layer in layers
            if layer >= min(config.recurrence.layers)
        )
    return once


def _block_multiply_adds(description: ModelDescription, layer: int, vision: int) -> float:
    base = family_of(description).block_multiply_adds(description.model, layer, vision)
    return base + added_multiply_adds(description, layer, vision)


def _recall(description: ModelDescription, vision: int) -> float:
    """Return multiply-adds of the map before a pass of the loop."""
    if description.loop is None or not description.loop.recall:
        return 0
    return 2 * (vision + description.model.text_length) * description.model.hidden_size**2


def _output_multiply_adds(description: ModelDescription, vision: int) -> float:
    model = description.model
    return vision * _patch(model) * model.hidden_size * (2 if model.learned_sigma else 1)


def outer_multiply_adds(description: ModelDescription, vision: int) -> float:
    """Return multiply-adds of embeddings and output projection."""
    model, hidden = description.model, description.model.hidden_size
    embedding = vision * _patch(model) * hidden + family_of(description).conditioning_multiply_adds(model)
    return embedding + _output_multiply_adds(description, vision) + 2 * hidden**2


def added_multiply_adds(description: ModelDescription, layer: int, vision: int) -> float:
    """Return what is added to block ``layer``."""
    added = adapter_in(description, layer)
    return 0 if added is None else added[0].multiply_adds(description.model, added[1], vision)


def _patch(model: ModelConfig) -> int:
    return model.patch_size**2 * model.in_channels
