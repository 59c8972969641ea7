"""AdamW for ZeRO: PyTorch's, on the flat shards that DeepSpeed makes of the parameters."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.engine.deepspeed.expert_groups import is_expert
from rmoe_megatron.engine.lr_schedule import decays, group_of, own_rates


def build_adam(config: RunConfig, parameters: Mapping[str, Tensor]) -> torch.optim.AdamW:
    """Return AdamW with Megatron-Core's groups: what decays or not, has a rate of its own or not, and experts that are spread apart.

    One kernel updates a shard of a group with its moments, so that NVIDIA's fused Adam (Apex) would have nothing to gain.
    """
    settings = config.optimizer
    groups: dict[tuple[bool, bool, str], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        decay, spread = decays(parameter, name), is_expert(parameter)
        rates = own_rates(config, group_of(name))
        place = spread, decay, group_of(name) if rates else ""
        group = groups.setdefault(place, {"params": [], "wd_mult": float(decay), **rates})
        if spread:
            group |= {"moe": True, "name": parameter.group_name}  # type: ignore[attr-defined]
        group["params"].append(parameter)
    return torch.optim.AdamW(
        list(groups.values()),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def flat_parameters(optimizer: Any) -> list[Tensor]:
    """Return the flat float32 shards that DeepSpeed's optimizer updates on this rank.

    Args:
        optimizer: DeepSpeed's of any stage of ZeRO, which has PyTorch's in it.
    """
    # Stage 3 puts them into PyTorch's groups for the moment of the update alone.
    for name in (
        "fp32_partitioned_groups_flat",
        "fp32_groups_flat_partition",
        "single_partition_of_fp32_groups",
    ):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    raise TypeError(f"{type(optimizer).__name__} is none of DeepSpeed's optimizers of ZeRO")


def create_adam_state(optimizer: Any) -> None:
    """Give PyTorch's Adam the state that it makes at its first update, for it to be saved or loaded.

    Before that update: DeepSpeed remembers where a parameter's part of the state is when it has updated the first of several
    groups, and would not know of the others'.
    """
    for parameter in flat_parameters(optimizer):
        if not optimizer.optimizer.state[parameter]:
            optimizer.optimizer.state[parameter] |= {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    link = getattr(optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:  # stages 1 and 2 find a parameter's part of the state by it
        link()
