"""The schedule of learning rate and weight decay, Megatron-Core's, and what decays, whatever the engine."""

from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from rmoe_megatron.config.run import LearningRateDecay, RunConfig


def decays(parameter: Tensor, name: str) -> bool:
    """Return whether weight decay shrinks a parameter: all but biases and vectors, as in Megatron-LM.

    So the gates, the embeddings of timestep and text and the table of labels decay as every other matrix does. The trainers of
    DiT (whose decay is 0) and of SD3 in diffusers leave no matrix out either.
    """
    return parameter.dim() > 1 and not name.endswith(".bias")


def group_of(name: str) -> str:
    """Return which of ``optimizer.group_learning_rates`` a parameter of this name has."""
    if ".recurrence." not in name:
        return "base"
    return "gate" if ".recurrence.gate." in name else "recurrence"


def own_rates(config: RunConfig, group: str) -> dict[str, float]:
    """Return the ends of the schedule of a group that has a learning rate of its own, nothing for one that has none.

    They are in proportion to those of ``optimizer.learning_rate``, so that the schedules are, too.
    """
    settings = config.optimizer
    rate: float | None = getattr(settings.group_learning_rates, group)
    if rate is None:
        return {}
    return {"max_lr": rate, "min_lr": settings.min_learning_rate * rate / settings.learning_rate}


def build_schedule(config: RunConfig, optimizer: Any) -> OptimizerParamScheduler:
    """Return linear warm-up and the decay that the configuration names, counted in steps.

    Args:
        optimizer: has ``param_groups`` with ``wd_mult``, as Megatron-Core's optimizers do, and those with :func:`own_rates` have these.
    """
    settings = config.optimizer
    is_wsd = settings.lr_decay_style is LearningRateDecay.wsd
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.learning_rate,
        min_lr=settings.min_learning_rate,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=config.training.steps,
        lr_decay_style="WSD" if is_wsd else settings.lr_decay_style.value,
        wsd_decay_steps=settings.wsd_decay_steps,
        lr_wsd_decay_style="linear",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # A resumed run follows its configuration, from the step of the checkpoint on.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
