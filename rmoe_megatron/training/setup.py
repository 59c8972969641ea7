"""Model, optimizer and schedule of a run, from Megatron-Core's parts."""

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from rmoe_megatron.config.schema import Precision, RunConfig
from rmoe_megatron.model.build import build_transformer
from rmoe_megatron.platform import PARAMS_DTYPE
from rmoe_megatron.training.fine_tuning import start_from_base


def build_model(config: RunConfig, device: torch.device) -> tuple[DistributedDataParallel, str | None]:
    """Return the model of this pipeline stage on ``device``, wrapped in Megatron-Core's data parallelism.

    The second value is the fingerprint of the frozen base, None without one.
    """
    model = build_transformer(
        config,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        initialise=config.fine_tuning is None,
    )
    base_fingerprint = start_from_base(model, config) if config.fine_tuning is not None else None
    model.to(device)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.optimizer.distributed_optimizer,
    )
    layout = None
    if ddp.use_distributed_optimizer:
        layout = DistributedOptimizer.compute_full_param_layout(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            bucket_size=None,  # one bucket: gradients are not reduced while the backward pass runs
            data_parallel_world_size=parallel_state.get_data_parallel_world_size(with_context_parallel=True),
            ddp_config=ddp,
            expert_data_parallel_world_size=parallel_state.get_expert_data_parallel_world_size(),
        )
    wrapped = DistributedDataParallel(model.config, ddp, model, full_param_layout=layout)
    wrapped.broadcast_params()
    return wrapped, base_fingerprint


def build_optimizer(
    config: RunConfig, model: DistributedDataParallel
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Return AdamW with float32 main parameters and its warm-up and cosine schedule, counted in steps."""
    optimizer = config.optimizer
    settings = OptimizerConfig(
        optimizer="adam",
        lr=optimizer.learning_rate,
        min_lr=optimizer.min_learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        clip_grad=optimizer.clip_grad,
        bf16=config.precision is Precision.bf16,
        params_dtype=PARAMS_DTYPE[config.precision],
        use_distributed_optimizer=optimizer.distributed_optimizer,
    )
    megatron_optimizer = get_megatron_optimizer(settings, [model])
    schedule = OptimizerParamScheduler(
        megatron_optimizer,
        init_lr=0.0,
        max_lr=optimizer.learning_rate,
        min_lr=optimizer.min_learning_rate,
        lr_warmup_steps=optimizer.warmup_steps,
        lr_decay_steps=config.training.steps,
        lr_decay_style="cosine",
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return megatron_optimizer, schedule
