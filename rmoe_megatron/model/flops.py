"""Floating-point operations of a model in closed form: matrix products only, two per multiply-add."""

from rmoe_megatron.config.schema import ModelConfig, RecurrenceConfig, RunConfig

TIMESTEP_CHANNELS = 256  # sinusoidal features of diffusers' timestep embedding


def training_flops_per_sample(config: RunConfig) -> float:
    """Return FLOPs of forward and backward of one image; the backward pass costs two forward passes."""
    return 3 * forward_flops_per_sample(config.model, config.recurrence)


def forward_flops_per_sample(model: ModelConfig, recurrence: RecurrenceConfig | None) -> float:
    """Return FLOPs of one forward pass of one image."""
    vision, text, hidden = vision_tokens(model), model.text_length, model.hidden_size
    patch = model.patch_size**2 * model.in_channels
    embeddings = (
        vision * patch * hidden
        + text * model.text_hidden_size * hidden
        + (TIMESTEP_CHANNELS + model.pooled_size + 2 * hidden) * hidden
    )
    output = vision * patch * hidden + 2 * hidden**2
    block = (
        12 * (vision + text) * hidden**2 + 12 * hidden**2 + attention(vision + text, vision + text, hidden)
    )
    last_block_saves = 9 * text * hidden**2 + 4 * hidden**2 + attention(text, vision + text, hidden)
    total = embeddings + output + model.num_layers * block - last_block_saves
    if recurrence is not None:
        total += len(recurrence.layers) * recurrence_multiply_adds(model, recurrence)
    return 2 * total


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
