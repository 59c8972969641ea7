"""Training that starts from another run's weights, with all, some or none of them frozen."""

from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from torch import nn

from rmoe_megatron.checkpoint.model_state import load_weights
from rmoe_megatron.checkpoint.weights import RunWeights
from rmoe_megatron.config.model import ModelConfig
from rmoe_megatron.config.run import FineTuningConfig, RunConfig, Trainable
from rmoe_megatron.errors import UserError
from rmoe_megatron.model.block import Block
from rmoe_megatron.model.registry import is_addition


def start_from_base(chunks: nn.ModuleList, config: RunConfig) -> str | None:
    """Load the base's weights and freeze what is not trained; recurrence and LoRA that the base lacks stay fresh.

    Returns:
        The fingerprint of the base if any of it is frozen. Checkpoints then leave the frozen weights out.

    Raises:
        UserError: the base is missing or of another architecture.
    """
    assert config.fine_tuning is not None
    base = RunWeights(Path(config.fine_tuning.base))
    if architecture(base.config.model) != architecture(config.model):
        raise UserError(
            f"fine_tuning.base {config.fine_tuning.base} has another architecture than the model section; "
            "give the same model section or another base."
        )
    for key in ("objective", "prediction"):
        learned, asked = getattr(base.config.diffusion, key), getattr(config.diffusion, key)
        if learned != asked:
            raise UserError(
                f"fine_tuning.base {config.fine_tuning.base} has learned diffusion.{key}={learned.value}, this run asks "
                f"for {asked.value}; set diffusion.{key}={learned.value} or take another base."
            )
    load_weights(chunks, base, fresh=is_addition)
    freeze(chunks, config.fine_tuning)
    if all(parameter.requires_grad for parameter in chunks.parameters()):
        return None
    fingerprint = [base.fingerprint() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(fingerprint, src=0)
    return fingerprint[0]


def architecture(model: ModelConfig) -> ModelConfig:
    """Return the model section without what weights don't depend on: image size, text length, the preset's name.

    An MM-DiT takes a crop of the base's positions, so that fine-tuning may use another resolution.
    """
    return replace(model, preset=None, sample_size=0, text_length=0)


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
        added = fine_tuning.trainable is Trainable.added and is_addition(name)
        parameter.requires_grad_(added or id(parameter) in trained)
