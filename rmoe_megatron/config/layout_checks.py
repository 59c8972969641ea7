"""Checks of a parallel layout: how a model and its batches are spread over ranks."""

from rmoe_megatron.config.model import DepthLoss
from rmoe_megatron.config.require import require, require_divides
from rmoe_megatron.config.run import ParallelConfig, Recompute, RunConfig, Trainable
from rmoe_megatron.config.stages import stages_of


def check_layout(config: RunConfig, world_size: int) -> None:
    """Check that the model can be spread over ``world_size`` ranks as configured.

    Raises:
        UserError: says which numbers don't divide.
    """
    model, parallel = config.model, config.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    context, virtual = parallel.context_parallel_size, parallel.virtual_pipeline_model_parallel_size
    require_divides(
        tensor * context * pipeline,
        "tensor_model_parallel_size x context_parallel_size x pipeline_model_parallel_size = "
        f"{tensor} x {context} x {pipeline}",
        world_size,
        "The number of ranks",
    )
    require(
        parallel.sequence_parallel == (tensor > 1),
        f"parallel.sequence_parallel is {str(parallel.sequence_parallel).lower()} with "
        f"tensor_model_parallel_size={tensor}; the two go together (tensor parallelism alone would hold every "
        f"activation on every rank): set sequence_parallel={str(tensor > 1).lower()}.",
    )
    require_divides(
        tensor, "parallel.tensor_model_parallel_size", model.num_attention_heads, "model.num_attention_heads"
    )
    for side in {model.sample_size, *(stage.sample_size for stage in config.training.stages)}:
        require_divides(
            tensor * context,
            f"tensor_model_parallel_size x context_parallel_size = {tensor} x {context}",
            (side // model.patch_size) ** 2,
            "The number of patches of an image",
        )
    require_divides(
        pipeline * virtual,
        f"pipeline_model_parallel_size x virtual_pipeline_model_parallel_size = {pipeline} x {virtual}",
        model.num_layers,
        "model.num_layers",
    )
    require(
        virtual == 1 or pipeline > 1,
        f"parallel.virtual_pipeline_model_parallel_size={virtual} needs pipeline_model_parallel_size greater than 1.",
    )
    _check_compile(config)
    _check_depth(config)
    _check_exclusive_attention(config)
    _check_trained_stages(config)
    _check_expert_parallelism(config, world_size // pipeline)
    _check_overlap(config)


def _check_compile(config: RunConfig) -> None:
    """A compiled block holds no collective, is not computed twice, has no hooks on its layers and no rotary positions."""
    parallel = config.parallel
    inside = {
        "parallel.tensor_model_parallel_size": parallel.tensor_model_parallel_size > 1,
        "parallel.context_parallel_size": parallel.context_parallel_size > 1,
        "parallel.overlap_param_gather": parallel.overlap_param_gather,
        "training.recompute": config.training.recompute is not Recompute.none,
        "model.rope_theta": config.model.rope_theta is not None,
    }
    for name, is_set in inside.items():
        require(
            not (config.training.compile and is_set),
            f"training.compile=true is for blocks without {name}; set one of the two back to its default.",
        )


def _check_depth(config: RunConfig) -> None:
    """Blocks that are passed again, or with fewer latent steps, are iterated outside of Megatron-Core's schedules and contexts."""
    if config.loop is None and config.diffusion.depth_loss is DepthLoss.last:
        return
    name = "loop" if config.loop is not None else f"diffusion.depth_loss={config.diffusion.depth_loss.value}"
    fine_tuning, parallel = config.fine_tuning, config.parallel
    refused = {
        "parallel.pipeline_model_parallel_size greater than 1": parallel.pipeline_model_parallel_size > 1,
        "training.compile=true": config.training.compile,
        f"precision={config.precision.value}": config.precision.is_below_bf16,
        "parallel.overlap_grad_reduce=true with training.recompute, which gives a gradient in several parts": (
            parallel.overlap_grad_reduce and config.training.recompute is not Recompute.none
        ),
        "frozen weights; set fine_tuning.trainable=all": (
            fine_tuning is not None and fine_tuning.trainable is not Trainable.all
        ),
    }
    for what, is_set in refused.items():
        require(not is_set, f"{name} is not for {what}.")


def _check_exclusive_attention(config: RunConfig) -> None:
    """The own values of a rank's tokens are cut out of all values where these are gathered, which no test proves."""
    require(
        not config.model.exclusive_attention
        or (config.parallel.context_parallel_size == 1 and not config.training.compile),
        "model.exclusive_attention is not for parallel.context_parallel_size greater than 1 or training.compile=true.",
    )


def _check_trained_stages(config: RunConfig) -> None:
    """Megatron-Core's optimizer and schedules need a trained parameter on every stage."""
    if config.fine_tuning is None or config.fine_tuning.trainable is Trainable.all:
        return
    parallel, adapter = config.parallel, config.recurrence or config.lora
    if config.fine_tuning.trainable is Trainable.blocks:
        trained = config.fine_tuning.blocks
    else:
        trained = adapter.layers if adapter is not None else []
    chunks = parallel.pipeline_model_parallel_size * parallel.virtual_pipeline_model_parallel_size
    size = config.model.num_layers // chunks
    for first in range(0, config.model.num_layers, size):
        require(
            chunks == 1 or any(first <= layer < first + size for layer in trained),
            f"Blocks {first} to {first + size - 1} make a pipeline stage and none of them is trained (trained are "
            f"{trained}); every stage needs one: choose other blocks or a smaller pipeline.",
        )


def _check_expert_parallelism(config: RunConfig, stage_ranks: int) -> None:
    """Experts are spread over the ranks of a pipeline stage, tensor-parallel ones first."""
    expert = config.parallel.expert_model_parallel_size
    if config.recurrence is None:
        require(
            expert == 1,
            f"parallel.expert_model_parallel_size is {expert} but the model has no experts (recurrence is null).",
        )
        return
    require_divides(
        expert, "parallel.expert_model_parallel_size", stage_ranks, "The number of ranks of a pipeline stage"
    )
    modules = config.recurrence.num_modules
    require_divides(expert, "parallel.expert_model_parallel_size", modules, "recurrence.num_modules")


def _check_overlap(config: RunConfig) -> None:
    parallel = config.parallel
    require(
        not parallel.overlap_param_gather
        or (parallel.overlap_grad_reduce and config.optimizer.distributed_optimizer),
        "parallel.overlap_param_gather needs parallel.overlap_grad_reduce=true and "
        "optimizer.distributed_optimizer=true.",
    )
    require(
        parallel.bucket_size is None or parallel.overlap_grad_reduce,
        f"parallel.bucket_size is {parallel.bucket_size}, which needs parallel.overlap_grad_reduce=true.",
    )


def check_batch(config: RunConfig, world_size: int) -> None:
    """Check that a global batch can be cut into micro-batches over the data-parallel ranks.

    Raises:
        UserError: says which numbers don't divide.
    """
    parallel = config.parallel
    data = data_parallel_size(parallel, world_size)
    for stage in stages_of(config):
        where = f"training.stages[{stage.number}]" if config.training.stages else "training"
        micro_batch, global_batch = stage.micro_batch_size, stage.global_batch_size
        together = f"micro_batch_size x data-parallel ranks = {micro_batch} x {data}"
        require_divides(micro_batch * data, together, global_batch, f"{where}.global_batch_size")
        if config.data.buckets is not None:
            require_divides(micro_batch * data, together, stage.bucket_batch, "data.buckets.batch")
            require_divides(
                stage.bucket_batch, "data.buckets.batch", global_batch, f"{where}.global_batch_size"
            )
            alone = world_size == data and parallel.expert_model_parallel_size == 1
            require(
                alone or stage.bucket_batch == global_batch,
                f"data.buckets.batch is {stage.bucket_batch}: micro-batches of several sizes in one step are for data parallelism "
                "alone; set data.buckets.batch=null.",
            )
        if parallel.virtual_pipeline_model_parallel_size > 1:
            require_divides(
                parallel.pipeline_model_parallel_size,
                "parallel.pipeline_model_parallel_size",
                global_batch // (micro_batch * data),
                "The number of micro-batches per step, for the interleaved schedule,",
            )


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Return how many replicas of the model ``world_size`` ranks hold."""
    return world_size // (
        parallel.tensor_model_parallel_size
        * parallel.context_parallel_size
        * parallel.pipeline_model_parallel_size
    )
