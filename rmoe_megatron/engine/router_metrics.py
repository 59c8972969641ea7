"""What is known of the gates of a step: begins with an empty record, and ends with their load-balancing loss by Megatron-Core's tracker."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker, get_moe_metrics_tracker
from torch import nn

from rmoe_megatron.config.model import DepthLoss
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.model.recurrence.gate import Gate
from rmoe_megatron.model.recurrence.gate_watch import GateWatch


def begin_step(modules: nn.Module, watch: GateWatch | None) -> None:
    """Begin a step with an empty tracker, and give the gates what they put down in it.

    Megatron-Core's tracker adds up and is the process's, as long as the first model that used it is deep.
    """
    destroy_moe_metrics_tracker()
    for module in modules.modules():
        if isinstance(module, Gate):
            module.watch = watch


def calls_of_gates(config: RunConfig) -> int:
    """Return how often the gates of a model decide in one forward pass of training."""
    recurrence, loop, depth_loss = config.recurrence, config.loop, config.diffusion.depth_loss
    assert recurrence is not None
    if loop is None:
        decoded = range(1, recurrence.steps + 1) if depth_loss is DepthLoss.every else [recurrence.steps]
        return len(recurrence.layers) * sum(decoded)
    decodings = {DepthLoss.last: 1, DepthLoss.drawn: 2, DepthLoss.every: loop.times}[depth_loss]
    passes = [
        1 if layer < loop.first else loop.times if layer <= loop.last else decodings
        for layer in recurrence.layers
    ]
    return recurrence.steps * sum(passes)


def load_balancing_loss(config: RunConfig, num_micro_batches: int, device: torch.device) -> dict[str, float]:
    """Return the mean load-balancing loss of a gate in the last step.

    The value is that of the Switch Transformer without its coefficient: 1 when tokens spread evenly, M when all go
    to one expert. The dict is empty for a model without this loss. Every rank takes part.
    """
    recurrence = config.recurrence
    if recurrence is None or recurrence.aux_loss_coeff == 0:
        return {}
    tracker = get_moe_metrics_tracker()
    total = torch.zeros((), device=device)
    if "load_balancing_loss" in tracker.metrics:
        total += tracker.metrics["load_balancing_loss"].values.sum()
    # Tensor- and context-parallel ranks have seen parts of the sequence, pipeline stages other gates.
    dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    gates = calls_of_gates(config) * num_micro_batches
    return {"load_balancing_loss": total.item() / (gates * parallel_state.get_data_parallel_world_size())}
