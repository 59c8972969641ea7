"""Number of parameters of a model in closed form, and what they take in memory at least."""

from rmoe_megatron.config.model import Architecture, ModelConfig, ModelDescription, RecurrenceConfig
from rmoe_megatron.config.run import Precision, RunConfig, Trainable
from rmoe_megatron.errors import UserError
from rmoe_megatron.model.flops import TIMESTEP_CHANNELS

GRADIENT_BYTES = 4  # gradients are reduced in float32


def dense_parameters(config: ModelDescription) -> int:
    """Return the number of parameters of the model without the modules of its recurrence."""
    model, hidden = config.model, config.model.hidden_size
    patch = model.patch_size**2 * model.in_channels
    outputs = patch * (2 if model.learned_sigma else 1)
    timestep = _linear(TIMESTEP_CHANNELS, hidden) + _linear(hidden, hidden)
    if model.architecture is Architecture.mmdit:
        conditioning = timestep + _linear(model.pooled_size, hidden) + _linear(hidden, hidden)
        conditioning += _linear(model.text_hidden_size, hidden)
    else:
        copies = 1 if model.shared_conditioning else model.num_layers
        conditioning = copies * (timestep + (model.num_classes + 1) * hidden)
    ends = _linear(patch, hidden) + _linear(hidden, 2 * hidden) + _linear(hidden, outputs)
    blocks = sum(_block(model, layer) + _added(config, layer) for layer in range(model.num_layers))
    return conditioning + ends + blocks


def module_parameters(config: ModelDescription) -> int:
    """Return the number of parameters of all modules of the recurrence, which expert parallelism spreads."""
    recurrence, hidden = config.recurrence, config.model.hidden_size
    if recurrence is None:
        return 0
    module = 3 * hidden**2 if recurrence.rank is None else 6 * hidden * recurrence.rank
    return len(recurrence.layers) * recurrence.num_modules * module


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
    dense, modules = dense_parameters(config), module_parameters(config)
    shards = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    spread = parallel.expert_model_parallel_size * parallel.pipeline_model_parallel_size
    trains_all = config.fine_tuning is None or config.fine_tuning.trainable is Trainable.all
    bytes_each = (2 if config.precision is Precision.bf16 else 4) + (GRADIENT_BYTES if trains_all else 0)
    needed = (dense // shards + modules // spread) * bytes_each
    if needed > bytes_per_rank:
        raise UserError(
            f"The model has {dense + modules:.3g} parameters, which take at least {needed / 1e9:.4g} GB on a rank of this "
            f"layout, but {where} has {bytes_per_rank / 1e9:.4g} GB for it; choose a smaller model or a layout that spreads "
            "it over more ranks."
        )


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _block(model: ModelConfig, layer: int) -> int:
    """Return the parameters of a block of the base model."""
    hidden = model.hidden_size
    norms = 2 * hidden // model.num_attention_heads if model.qk_norm else 0  # of queries and keys
    attention = _linear(hidden, 3 * hidden) + _linear(hidden, hidden) + norms
    stream = (
        attention + _linear(hidden, 4 * hidden) + _linear(4 * hidden, hidden) + _linear(hidden, 6 * hidden)
    )
    if model.architecture is Architecture.dit:
        return stream
    dual = attention + 3 * _linear(hidden, hidden) if layer in model.dual_attention_layers else 0
    if layer < model.num_layers - 1:
        return 2 * stream + dual
    last_text = _linear(hidden, 3 * hidden) + norms + _linear(hidden, 2 * hidden)
    return stream + dual + last_text


def _added(config: ModelDescription, layer: int) -> int:
    """Return the parameters of gate and modulation of a recurrence, or of LoRA."""
    hidden = config.model.hidden_size
    if config.lora is not None and layer in config.lora.layers:
        return 6 * hidden * config.lora.rank
    if config.recurrence is not None and layer in config.recurrence.layers:
        return _gate(config.recurrence, hidden)
    return 0


def _gate(recurrence: RecurrenceConfig, hidden: int) -> int:
    gate = recurrence.num_modules * hidden * len(recurrence.gate_inputs)
    return gate + (_linear(hidden, 2 * hidden) if recurrence.modulation else 0)
