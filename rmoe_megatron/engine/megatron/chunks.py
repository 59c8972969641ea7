"""What a rank has of the model, in Megatron-Core's data parallelism."""

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.param_layout import FullParamLayout
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.model.diffusion_transformer import DiffusionTransformer

# Parameters in a bucket that is reduced while the backward pass goes on; Megatron-Core's default.
BUCKET_SIZE = 40_000_000


class ModelChunks:
    """What this rank has of the model, wrapped in Megatron-Core's data parallelism.

    It is one chunk, or with the interleaved pipeline schedule several.

    Args:
        modules: chunks of the DiffusionTransformer, in the order in which a sample passes them.
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


def data_parallelism(config: RunConfig) -> DistributedDataParallelConfig:
    """Return how gradients are reduced and parameters gathered."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.optimizer.distributed_optimizer,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        bucket_size=config.parallel.bucket_size or BUCKET_SIZE,
    )
