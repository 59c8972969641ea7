"""Tiny configurations and process groups for tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from rmoe_megatron.config.model import ModelConfig, RecurrenceConfig
from rmoe_megatron.config.run import DataConfig, Device, OptimizerConfig, RunConfig, TrainingConfig

HIDDEN, HEADS, TEXT_LENGTH = 32, 2, 5

MODEL = ModelConfig(
    sample_size=8,
    patch_size=2,
    in_channels=3,
    num_layers=3,
    hidden_size=HIDDEN,
    num_attention_heads=HEADS,
    qk_norm=True,
    text_length=TEXT_LENGTH,
    text_hidden_size=12,
    pooled_size=10,
    pos_embed_max_size=4,
)
RECURRENCE = RecurrenceConfig(
    layers=[1, 2], num_modules=4, steps=2, rank=4, up_init_std=0.1, aux_loss_coeff=0.01
)


def tiny_config(recurrence: RecurrenceConfig | None = RECURRENCE, **changes: object) -> RunConfig:
    """A run configuration of a model with about 60,000 parameters."""
    config = RunConfig(
        run_dir="unused",
        device=Device.cpu,
        model=MODEL,
        recurrence=recurrence,
        data=DataConfig(train="unused"),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        training=TrainingConfig(steps=20, micro_batch_size=4, global_batch_size=8),
    )
    return replace(config, **changes)


def randomise(module: torch.nn.Module, seed: int = 0, std: float = 0.2) -> None:
    """Give every parameter random values, so that no zero initialisation hides a path."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


@contextmanager
def one_rank(config: RunConfig) -> Iterator[torch.device]:
    """Process groups of a single rank, without a port."""
    from rmoe_megatron.distributed.process_groups import process_groups

    with process_groups(config) as device:
        yield device
