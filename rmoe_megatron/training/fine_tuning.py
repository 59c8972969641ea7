"""Training that starts from another run's weights, with all, some or none of them frozen."""

from pathlib import Path

import torch.distributed as dist
from torch import nn

from rmoe_megatron.checkpoint.model_state import load_weights
from rmoe_megatron.checkpoint.weights import RunWeights
from rmoe_megatron.config.run import FineTuningConfig, RunConfig, Trainable
from rmoe_megatron.model.block import Block
from rmoe_megatron.model.registry import is_adapter
from rmoe_megatron.training.base_checks import check_fits


def start_from_base(chunks: nn.ModuleList, config: RunConfig) -> str | None:
    """Load the base's weights and freeze what is not trained; recurrence and LoRA that the base lacks stay fresh.

    Returns:
        The fingerprint of the base if any of it is frozen. Checkpoints then leave the frozen weights out.

    Raises:
        UserError: the base is missing or of another architecture.
    """
    assert config.fine_tuning is not None
    base = RunWeights(Path(config.fine_tuning.base))
    check_fits(config, base.config)
    load_weights(chunks, base, fresh=is_adapter)
    freeze(chunks, config.fine_tuning)
    if all(parameter.requires_grad for parameter in chunks.parameters()):
        return None
    fingerprint = [base.fingerprint() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(fingerprint, src=0)
    return fingerprint[0]


def freeze(chunks: nn.ModuleList, fine_tuning: FineTuningConfig) -> None:
    """Let only the configured part of the model take gradients."""
    if fine_tuning.trainable is Trainable.all:
        return
    trained = {
        id(parameter)
        for block in chunks.modules()
        if isinstance(block, Block) and block.layer_number - 1 in fine_tuning.blocks
        for parameter in block.parameters()
    }
    for name, parameter in chunks.named_parameters():
        added = fine_tuning.trainable is Trainable.added and is_adapter(name)
        parameter.requires_grad_(added or id(parameter) in trained)
