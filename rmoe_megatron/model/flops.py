"""Floating-point operations of a model in closed form: matrix products only, two per multiply-add."""

from rmoe_megatron.config.model import Architecture, ModelConfig, ModelDescription, RecurrenceConfig
from rmoe_megatron.config.run import RunConfig, Trainable

TIMESTEP_CHANNELS = 256  # sinusoidal features of diffusers' timestep embedding


def training_flops_per_sample(config: RunConfig) -> float:
    """Return FLOPs of forward and backward of one image.

    The backward pass costs two forward passes: gradients of the inputs and of the weights. Weights that are frozen
    save the second; blocks before the first trained one save both.
    """
    model, fine_tuning = config.model, config.fine_tuning
    added = {layer: added_multiply_adds(config, layer) for layer in range(model.num_layers)}
    if fine_tuning is None or fine_tuning.trainable is Trainable.all:
        return 3 * forward_flops_per_sample(config)
    if fine_tuning.trainable is Trainable.added:
        trained = {layer for layer, multiply_adds in added.items() if multiply_adds > 0}
    else:
        trained = set(fine_tuning.blocks)
    total = outer_multiply_adds(model) * 2
    for layer in range(model.num_layers):
        base = block_multiply_adds(model, layer)
        total += base * (2 if layer >= min(trained) else 1) + added[layer] * 3
        total += base if layer in trained and fine_tuning.trainable is Trainable.blocks else 0
    return 2 * total


def forward_flops_per_sample(config: ModelDescription) -> float:
    """Return FLOPs of one forward pass of one image."""
    layers = range(config.model.num_layers)
    blocks = sum(
        block_multiply_adds(config.model, layer) + added_multiply_adds(config, layer) for layer in layers
    )
    return 2 * (outer_multiply_adds(config.model) + blocks)


def outer_multiply_adds(model: ModelConfig) -> float:
    """Return multiply-adds of embeddings and output projection."""
    vision, hidden = vision_tokens(model), model.hidden_size
    patch = model.patch_size**2 * model.in_channels
    conditioning = (TIMESTEP_CHANNELS + hidden) * hidden
    if model.architecture is Architecture.mmdit:
        conditioning += model.text_length * model.text_hidden_size * hidden
        conditioning += (model.pooled_size + hidden) * hidden
    output = vision * patch * hidden * (2 if model.learned_sigma else 1) + 2 * hidden**2
    return vision * patch * hidden + conditioning + output


def block_multiply_adds(model: ModelConfig, layer: int) -> float:
    """Return multiply-adds of a block without recurrence: projections, MLP, modulation, attention."""
    vision, text, hidden = vision_tokens(model), model.text_length, model.hidden_size
    tokens = vision + text
    if model.architecture is Architecture.dit:
        return 12 * vision * hidden**2 + 6 * hidden**2 + attention(vision, vision, hidden)
    block = 12 * tokens * hidden**2 + 12 * hidden**2 + attention(tokens, tokens, hidden)
    if layer in model.dual_attention_layers:
        block += 4 * vision * hidden**2 + 3 * hidden**2 + attention(vision, vision, hidden)
    if layer == model.num_layers - 1:  # its text stream ends in the attention
        block -= 9 * text * hidden**2 + 4 * hidden**2 + attention(text, tokens, hidden)
    return block


def added_multiply_adds(config: ModelDescription, layer: int) -> float:
    """Return what recurrence or LoRA adds to block ``layer``."""
    if config.recurrence is not None and layer in config.recurrence.layers:
        return recurrence_multiply_adds(config.model, config.recurrence)
    if config.lora is not None and layer in config.lora.layers:
        return vision_tokens(config.model) * 6 * config.model.hidden_size * config.lora.rank
    return 0


def recurrence_multiply_adds(model: ModelConfig, recurrence: RecurrenceConfig) -> float:
    """Return what recurrence adds to one block: modules in every latent step, attention in all but the last."""
    vision, text, hidden = vision_tokens(model), model.text_length, model.hidden_size
    module = 3 * hidden**2 if recurrence.rank is None else 6 * hidden * recurrence.rank
    gate = recurrence.num_modules * hidden if "tokens" in recurrence.gate_inputs else 0
    step = vision * (module + gate) + (2 * hidden**2 if recurrence.modulation else 0)
    intermediate = vision * hidden**2 + attention(vision, vision + text, hidden)
    return recurrence.steps * step + (recurrence.steps - 1) * intermediate


def attention(queries: int, keys: int, hidden: int) -> float:
    """Return multiply-adds of scores and weighted values."""
    return 2 * queries * keys * hidden


def vision_tokens(model: ModelConfig) -> int:
    """Return the number of patches of an image."""
    return (model.sample_size // model.patch_size) ** 2
