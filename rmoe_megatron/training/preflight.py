"""Everything that is checked before a run starts: its configuration, and what it needs of this machine."""

from pathlib import Path

import torch

from rmoe_megatron import durable
from rmoe_megatron.config.run import Device, RunConfig
from rmoe_megatron.config.validation import validate
from rmoe_megatron.data.shards import list_shards
from rmoe_megatron.errors import UserError
from rmoe_megatron.model.checks import check_model


def check(config: RunConfig, world_size: int) -> None:
    """Check a run of ``world_size`` ranks: the model, how it is trained, and what it needs of this machine.

    Raises:
        UserError: names the key, the value and what is allowed, or what is missing.
    """
    check_model(config)
    validate(config, world_size)
    check_machine(config)


def check_machine(config: RunConfig) -> None:
    """Check that what a validated configuration names is there.

    Raises:
        UserError: names the key and what is missing or cannot be written.
    """
    if config.device is Device.cuda and not torch.cuda.is_available():
        raise UserError("device is cuda but PyTorch finds no GPU here; set device=cpu or device=auto.")
    if config.fine_tuning is not None and not Path(config.fine_tuning.base).is_dir():
        raise UserError(
            f"There is no run at fine_tuning.base {config.fine_tuning.base}; train one or import one with "
            "`rmoe convert from-hf`."
        )
    list_shards(Path(config.data.train))
    if config.data.validation is not None:
        list_shards(Path(config.data.validation))
    durable.check_writable(Path(config.run_dir), "run_dir")
