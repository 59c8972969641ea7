"""AdamW and Muon, their schedule, and what a checkpoint holds of them, from Megatron-Core's parts."""

from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamGroupOverride,
    ParamKey,
    ParamWithNamePredicate,
    get_megatron_optimizer,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from rmoe_megatron.config.run import GroupLearningRates, OptimizerName, Precision, RunConfig
from rmoe_megatron.distributed.device import PARAMS_DTYPE
from rmoe_megatron.engine.lr_schedule import build_schedule, decays, group_of, own_rates
from rmoe_megatron.engine.megatron.chunks import ModelChunks
from rmoe_megatron.engine.megatron.gradient_norm import parts
from rmoe_megatron.engine.megatron.muon import (
    is_muon,
    mark_main_weights,
    mark_parameters,
    muon_settings,
)
from rmoe_megatron.engine.protocol import MainWeight

# Megatron-Core's format that can be loaded under any other parallel layout.
OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


# One kernel over a parameter and its moments instead of one an operation; PyTorch's Adam does not choose it by itself.
FUSED = {"fused": True, "foreach": False}

# What weight decay leaves alone.
STAYS = ParamKey(
    with_name_predicate=ParamWithNamePredicate(
        name="stays", fn=lambda parameter, name: not decays(parameter, name)
    )
)

# Under this name a group says which of the configuration's it is, if that has a learning rate of its own.
LEARNS_AS = "learns_as"

# Where the state of an optimizer of no parameter of this rank has its counter of updates.
WITHOUT_PARAMETERS: Any = "without parameters"


def build_optimizer(
    config: RunConfig, model: ModelChunks
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Return AdamW, or Muon with AdamW, with float32 main parameters, and the schedule of the learning rate, counted in steps."""
    optimizer = config.optimizer
    has_muon = optimizer.name is OptimizerName.muon
    settings = OptimizerConfig(
        optimizer="muon" if has_muon else "adam",
        lr=optimizer.learning_rate,
        min_lr=optimizer.min_learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        clip_grad=optimizer.clip_grad,
        bf16=config.precision is not Precision.fp32,
        params_dtype=PARAMS_DTYPE[config.precision],
        use_distributed_optimizer=optimizer.distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
        **(muon_settings(config) if has_muon else {}),
    )
    if has_muon:
        mark_parameters(model.modules.named_parameters(), model.config.kv_channels)
    # A main weight that autograd knows of keeps, through the hooks of data parallelism, the model and the optimizer itself alive,
    # in a circle that Python cannot see.
    with torch.no_grad():
        megatron_optimizer = get_megatron_optimizer(
            settings, model.wrapped, {STAYS: ParamGroupOverride(wd_mult=0.0), **_own_rates(config)}
        )
    for part in parts(megatron_optimizer):
        _detach_main_weights(part)
        mark_main_weights(part)
    for adam in _adam_optimizers(megatron_optimizer):
        if isinstance(adam, torch.optim.Adam):  # neither Transformer Engine's nor Apex's is here
            for group in adam.param_groups:
                group |= FUSED
    return megatron_optimizer, build_schedule(config, megatron_optimizer)


def _own_rates(config: RunConfig) -> dict[ParamKey, ParamGroupOverride]:
    """Return which parameters have learning rates of their own, and these."""
    overrides = {}
    for group in (each.name for each in fields(GroupLearningRates)):
        rates = own_rates(config, group)
        if rates:
            predicate = ParamWithNamePredicate(name=group, fn=partial(_is_of, group))
            # More than Megatron-Core's keys may stand in a group, and is saved with it.
            override = cast(ParamGroupOverride, {**rates, LEARNS_AS: group})
            overrides[ParamKey(with_name_predicate=predicate)] = override
    return overrides


def _is_of(group: str, parameter: torch.Tensor, name: str) -> bool:
    return group_of(name) == group


def _detach_main_weights(part: MegatronOptimizer) -> None:
    """Take the main weights of a float32 model out of autograd's sight; they still share the memory of the model's weights.

    Megatron-Core's are views. PyTorch refuses to use those, which were made without autograd, once the weights were set to others, as
    validation and loading do.
    """
    detached: dict[int, torch.Tensor] = {}
    for shards in getattr(part, "shard_fp32_groups", []):  # the distributed optimizer's alone
        for index, shard in enumerate(shards):
            detached[id(shard)] = shard.data  # not detach(), whose result still refers to the weight
            detached[id(shard)].__dict__.update(shard.__dict__)
            shards[index] = detached[id(shard)]
    if part.optimizer is None:  # nothing of this part is trained
        return
    for group in part.optimizer.param_groups:
        group["params"] = [detached.get(id(parameter), parameter) for parameter in group["params"]]


def load_optimizer(optimizer: MegatronOptimizer, saved: dict[str, Any], scheduler: dict[str, Any]) -> None:
    """Load moments and counters; learning rates, betas, eps and momentum stay those of the configuration."""
    configured = [
        {
            name: group[name]
            for name in ("max_lr", "min_lr", "betas", "eps", "momentum", *FUSED)
            if name in group
        }
        for group in optimizer.param_groups
    ]
    rates = {
        each[LEARNS_AS]: {name: each[name] for name in ("max_lr", "min_lr")}
        for each in _saved_groups(saved)
        if LEARNS_AS in each
    }
    for group in optimizer.param_groups:
        # Megatron-Core finds a group's saved counterpart by these.
        kept = rates[group[LEARNS_AS]] if LEARNS_AS in group else scheduler
        group.update({name: kept[name] for name in ("max_lr", "min_lr")})
    optimizer.load_state_dict(saved)
    for group, values in zip(optimizer.param_groups, configured, strict=True):
        group.update(values)
    for adam in _adam_optimizers(optimizer):
        if any(group["params"] for group in adam.param_groups):
            adam.state.pop(WITHOUT_PARAMETERS, None)  # of the rank that saved, which had none
        for parameter, state in adam.state.items():
            if not torch.is_tensor(parameter):
                continue
            # Megatron-Core gives all parameters the same counter, which each of them would then advance, on the host.
            state["step"] = state["step"].to(parameter.device, copy=True)


def _saved_groups(saved: Any) -> Iterator[dict[str, Any]]:
    """Yield the groups of an optimizer's saved state, wherever they stand in it."""
    if isinstance(saved, dict):
        for key, value in saved.items():
            yield from value if key == "param_groups" else _saved_groups(value)


def main_weights(
    optimizer: MegatronOptimizer, parameters: dict[str, torch.Tensor], is_sharded: bool
) -> dict[str, MainWeight]:
    """Return what this rank's optimizer keeps in float32 of the parameters that are not, by their names.

    Args:
        is_sharded: the optimizer is the distributed one.
    """
    kept: dict[int, tuple[int, torch.Tensor]] = {}
    for part in parts(optimizer):
        rounded = chain(*getattr(part, "model_float16_groups" if is_sharded else "float16_groups", []))
        mains = chain(*getattr(part, f"{'shard_' if is_sharded else ''}fp32_from_float16_groups", []))
        for parameter, main in zip(rounded, mains, strict=True):
            start = part._get_model_param_range_map(parameter)["param"].start if is_sharded else 0
            kept[id(parameter)] = start, main.detach().view(-1)
    found = {}
    for name, parameter in parameters.items():
        if parameter.dtype is not torch.float32:
            # Nothing of it may be in this rank's shard.
            start, values = kept.get(id(parameter), (0, torch.empty(0, device=parameter.device)))
            found[name] = MainWeight(start, values, _sharing_ranks(parameter) if is_sharded else None)
    return found


def _sharing_ranks(parameter: torch.Tensor) -> torch.distributed.ProcessGroup:
    """Return the ranks over which the distributed optimizer spreads a parameter: Megatron-Core's mark of modules decides."""
    if getattr(parameter, "allreduce", True):
        return parallel_state.get_data_parallel_group(with_context_parallel=True)
    return parallel_state.get_expert_data_parallel_group()


def create_state(optimizer: MegatronOptimizer) -> None:
    """Give PyTorch's Adam and Muon the state they make at their first update: Megatron-Core saves and loads what is there.

    An optimizer of no parameter of this rank (a pipeline stage without modules, a shard that is padding only) gets the counter of
    updates alone: Megatron-Core asks every rank for it, and saves that of the first. A collective.
    """
    for part in parts(optimizer):
        if is_muon(part.optimizer):
            part.init_state_fn(part.optimizer, part.config)
    adams = _adam_optimizers(optimizer)
    for adam in adams:
        for group in adam.param_groups:
            for parameter in group["params"]:
                if parameter not in adam.state:
                    adam.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
    counters = [state["step"] for adam in adams for key, state in adam.state.items() if torch.is_tensor(key)]
    updates = torch.zeros((), dtype=torch.float32, device=torch.cuda.current_device())
    if counters:
        updates += counters[0].to(updates.device)
    torch.distributed.all_reduce(updates, torch.distributed.ReduceOp.MAX)
    for adam in adams:
        if not any(group["params"] for group in adam.param_groups):
            adam.state[WITHOUT_PARAMETERS] = {"step": updates.clone()}


def _adam_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    return [part.optimizer for part in parts(optimizer) if not is_muon(part.optimizer)]
