"""DeepSpeed itself: whether it is here, how it is told its device, and its section ``zero_optimization``."""

import difflib
import importlib
import logging
import os
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from rmoe_megatron.config.require import require
from rmoe_megatron.config.run import Precision, RunConfig
from rmoe_megatron.distributed.device import runs_on_cuda
from rmoe_megatron.distributed.launch import local_rank
from rmoe_megatron.errors import UserError
from rmoe_megatron.model.precision.backend import is_installed

INSTALL = "DS_BUILD_OPS=0 pip install 'rmoe-megatron[deepspeed]'"
# What of DeepSpeed's section zero_optimization a run may set, and at which stages: how it communicates and where things lie, not
# what is computed.
OPTIONS = {
    "allgather_bucket_size": (1, 2), "allgather_partitions": (1, 2), "contiguous_gradients": (1, 2), "overlap_comm": (1, 2, 3),
    "reduce_bucket_size": (1, 2, 3), "reduce_scatter": (1, 2), "round_robin_gradients": (1, 2), "stage3_max_live_parameters": (3,),
    "stage3_max_reuse_distance": (3,), "stage3_prefetch_bucket_size": (3,), "sub_group_size": (3,), "zero_hpz_partition_size": (3,),
}  # fmt: skip
# With expert parallelism only these options are allowed; DeepSpeed's other code paths do not handle expert parameters.
OPTIONS_OF_SPREAD_EXPERTS = ("allgather_bucket_size", "overlap_comm", "reduce_bucket_size")
# Gradients in a bucket that is reduced, as in Megatron-Core. DeepSpeed's own choice of 5e8 takes 2 GB on every rank at stage 3.
REDUCE_BUCKET_SIZE = 40_000_000
MOST = 10**10


def import_deepspeed(on_cpu: bool) -> ModuleType:
    """Return DeepSpeed for this process's device, which it looks for when it is imported."""
    os.environ["DS_ACCELERATOR"] = "cpu" if on_cpu else "cuda"
    os.environ.setdefault("LOCAL_RANK", str(local_rank()))  # which it asks for whoever started the ranks
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed = importlib.import_module("deepspeed")
    if on_cpu:
        # Otherwise a kernel of shared memory is compiled at the start, which only inference uses.
        importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def check_deepspeed(config: RunConfig, world_size: int) -> None:
    """Check that DeepSpeed is here, and takes the options on ``world_size`` ranks.

    Raises:
        UserError: it is not, or names the option that is wrong.
    """
    if not is_installed("deepspeed"):
        raise UserError(
            f"engine=deepspeed needs DeepSpeed, which is not installed: {INSTALL}, or set engine=megatron."
        )
    for name in options_of(config):
        _check_option(config, str(name))
    second = options_of(config).get("zero_hpz_partition_size", 1)
    require(
        not isinstance(second, int) or second < 1 or world_size % second == 0,
        f"deepspeed.engine_options.zero_hpz_partition_size ({second}) does not divide the number of ranks ({world_size}); "
        "take the number of GPUs of a node.",
    )
    import_deepspeed(on_cpu=not runs_on_cuda(config.device))
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**zero_section(config))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise UserError(
            f"deepspeed.engine_options.{name} is {first['input']!r}: {first['msg']}; see DeepSpeed's zero_optimization."
        ) from error


def _check_option(config: RunConfig, name: str) -> None:
    stage, where = config.deepspeed.zero_stage, f"deepspeed.engine_options.{name}"
    if name not in OPTIONS:
        nearest = difflib.get_close_matches(name, OPTIONS, n=1)
        suggestion = f"did you mean {nearest[0]}?" if nearest else f"they are {', '.join(OPTIONS)}."
        raise UserError(
            f"deepspeed.engine_options has {name!r}, which is none of the options a run may set; {suggestion}"
        )
    require(
        stage in OPTIONS[name],
        f"{where} is for stage {' or '.join(map(str, OPTIONS[name]))} of ZeRO, but deepspeed.zero_stage is {stage}; leave it out, "
        f"or where the run has it set {where}=null.",
    )
    require(
        config.parallel.expert_model_parallel_size == 1 or name in OPTIONS_OF_SPREAD_EXPERTS,
        f"{where} is not for parallel.expert_model_parallel_size="
        f"{config.parallel.expert_model_parallel_size}; leave it out.",
    )
    value = options_of(config)[name]
    require(
        not isinstance(value, int) or value <= MOST,
        f"{where} is {value}; it may be at most {MOST}, as many numbers as a GPU's memory can hold of them.",
    )


def options_of(config: RunConfig) -> dict[str, Any]:
    """Return the options that are set; null takes one of a saved run's back."""
    return {
        name: value for name, value in (config.deepspeed.engine_options or {}).items() if value is not None
    }


def zero_section(config: RunConfig) -> dict[str, Any]:
    """Return DeepSpeed's section ``zero_optimization``."""
    settings = config.deepspeed
    section: dict[str, Any] = {"stage": settings.zero_stage, "reduce_bucket_size": REDUCE_BUCKET_SIZE}
    section |= options_of(config)
    if settings.zero_stage == 3:
        # What is written into a parameter's shards between steps is to be the parameter, so none is kept whole.
        section["stage3_param_persistence_threshold"] = 0
    if settings.offload_optimizer:
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": runs_on_cuda(config.device)}
    if settings.offload_parameters:
        section["offload_param"] = {"device": "cpu", "pin_memory": runs_on_cuda(config.device)}
    return section


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a run."""
    return {
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        # Where a step ends is said to it: stages of a run may have different numbers of micro-batches.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.clip_grad,
        "zero_optimization": zero_section(config),
        # PyTorch's Adam on the host is asked for, not DeepSpeed's, which has to be compiled there.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.precision is Precision.bf16},
        # As Megatron-Core's engine: gradients are added up and reduced in float32.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": None,
        # It would wait for the device before every micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }
