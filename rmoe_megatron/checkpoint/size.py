"""How much of a disk a checkpoint takes, from the configuration alone."""

from rmoe_megatron.config.run import RunConfig, Trainable
from rmoe_megatron.model.parameters import dense_parameters, expert_parameters

# An average, a main parameter and Adam's two moments, in float32.
STATE_BYTES = 4 * 4


def checkpoint_bytes(config: RunConfig) -> int:
    """Return what a checkpoint takes: weights, and of what is trained their average, main parameters and moments.

    With ``fine_tuning.trainable=added`` it is of the adapters alone; with ``blocks`` an upper bound.
    """
    dense, experts = dense_parameters(config), expert_parameters(config)
    if config.fine_tuning is not None and config.fine_tuning.trainable is Trainable.added:
        dense = (
            0  # the gate, the modulation and LoRA are small beside the experts, or there is nothing larger
        )
    return (dense + experts) * (STATE_BYTES + config.precision.parameter_bytes)
