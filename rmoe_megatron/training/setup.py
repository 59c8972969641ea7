"""Model, optimizer and schedule of a run, from Megatron-Core's parts."""

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.param_layout import FullParamLayout
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from rmoe_megatron.config.run import Precision, RunConfig
from rmoe_megatron.model.build import build_chunks
from rmoe_megatron.model.diffusion_transformer import DiffusionTransformer
from rmoe_megatron.platform import PARAMS_DTYPE
from rmoe_megatron.training.fine_tuning import start_from_base

# Parameters in a bucket that is reduced while the backward pass goes on; Megatron-Core's default.
BUCKET_SIZE = 40_000_000


class ModelChunks:
    """What this rank has of the model, wrapped in Megatron-Core's data parallelism.

    It is one chunk, or with the interleaved pipeline schedule several.

    Args:
        modules: of DiffusionTransformer, in the order in which a sample passes them.
    """

    def __init__(self, modules: nn.ModuleList, ddp: DistributedDataParallelConfig) -> None:
        self.modules = modules
        assert isinstance(modules[0], DiffusionTransformer)
        self.config: TransformerConfig = modules[0].config
        self.overlaps_param_gather = ddp.overlap_param_gather
        self.wrapped = [self._wrap(module, ddp, first=module is modules[0]) for module in modules]
        for chunk in self.wrapped:
            chunk.broadcast_params()
        if ddp.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.wrapped]
            self.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    @staticmethod
    def _wrap(module: nn.Module, ddp: DistributedDataParallelConfig, first: bool) -> DistributedDataParallel:
        # Gradients of later chunks and stages are ready early: one bucket will do for each of them.
        buckets = ddp.overlap_grad_reduce and first and parallel_state.get_pipeline_model_parallel_rank() == 0
        layout = _parameter_layout(module, ddp, ddp.bucket_size if buckets else None)
        return DistributedDataParallel(
            module.config, ddp, module, disable_bucketing=not buckets, full_param_layout=layout
        )

    def train(self, mode: bool = True) -> None:
        """Set the training mode of all chunks."""
        for chunk in self.wrapped:
            chunk.train(mode)

    def zero_grad_buffer(self) -> None:
        """Clear the gradients before a step."""
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()

    def gather_parameters(self) -> None:
        """Wait until the parameters of the last update have come from the other ranks."""
        if self.overlaps_param_gather:
            for chunk in self.wrapped:
                chunk.start_param_sync(force_sync=True)


def _parameter_layout(
    module: nn.Module, ddp: DistributedDataParallelConfig, bucket_size: int | None
) -> FullParamLayout | None:
    """Say where each parameter lies in the buffers that the distributed optimizer shards; None without it."""
    if not ddp.use_distributed_optimizer:
        return None
    full = DistributedOptimizer.compute_full_param_layout(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        bucket_size=bucket_size,
        data_parallel_world_size=parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        ddp_config=ddp,
        expert_data_parallel_world_size=parallel_state.get_expert_data_parallel_world_size(),
    )
    for layout in full.layouts.values():
        # Megatron-Core 0.19.2 saves buckets without the padding at their ends but reads parameters at their offsets
        # with it: in every bucket but the first, checkpoints held other parameters' state. So the padding is no padding.
        layout.per_bucket_numel_unpadded = [end - start for start, end in layout.bucket_indices]
    return full


def build_model(config: RunConfig, device: torch.device) -> tuple[ModelChunks, str | None]:
    """Return what this rank has of the model, on ``device``.

    The second value is the fingerprint of the frozen base, None without one.
    """
    modules = build_chunks(config, initialise=config.fine_tuning is None)
    base_fingerprint = start_from_base(modules, config) if config.fine_tuning is not None else None
    modules.to(device)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.optimizer.distributed_optimizer,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        bucket_size=config.parallel.bucket_size or BUCKET_SIZE,
    )
    return ModelChunks(modules, ddp), base_fingerprint


def build_optimizer(
    config: RunConfig, model: ModelChunks
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
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    megatron_optimizer = get_megatron_optimizer(settings, model.wrapped)
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
        # A resumed run follows its configuration, from the step of the checkpoint on.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return megatron_optimizer, schedule
