"""The plan of a layout: what each pipeline stage needs, whether it fits, and how long a step takes."""

from dataclasses import asdict, dataclass, replace

from rmoe_megatron.config.layout_checks import data_parallel_size
from rmoe_megatron.config.run import EngineName, Precision, RunConfig
from rmoe_megatron.errors import UserError
from rmoe_megatron.model.flops import training_flops_per_sample
from rmoe_megatron.planning.costs import Storage
from rmoe_megatron.planning.dry_run import RankUsage, dry_run
from rmoe_megatron.planning.hardware import Hardware
from rmoe_megatron.planning.step_time import (
    StepTime,
    hides_behind,
    message_seconds,
    operation_seconds,
    pipeline_time,
    stage_time,
)

# Of a GPU's memory: the driver, NCCL's buffers and cuBLAS's workspaces take some, and an allocator leaves gaps.
USABLE = 0.92


@dataclass(frozen=True)
class Plan:
    """A configuration on some accelerators.

    Attributes:
        stages: the first rank of every pipeline stage.
        seconds: what a step takes, by what takes it.
    """

    config: RunConfig
    hardware: Hardware
    ranks: int
    stages: list[RankUsage]
    seconds: StepTime
    ranks_per_node: int = 8

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment of the fullest stage."""
        return max(stage.peak for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether every stage fits into the memory of its accelerator."""
        return self.peak <= USABLE * self.hardware.memory

    @property
    def samples_per_second(self) -> float:
        """Of all ranks together."""
        return self.config.training.global_batch_size / self.seconds.total

    @property
    def mfu(self) -> float:
        """Share of the accelerators' bf16 rate that the model's own FLOPs take."""
        flops = training_flops_per_sample(self.config) * self.samples_per_second
        return flops / (self.ranks * self.hardware.bf16_flops)

    def checkpoint_share(self, checkpoint: int) -> float:
        """Return the share of the run's time that passes while all ranks write checkpoints of so many bytes."""
        writing = checkpoint / self.hardware.storage
        return writing / (writing + self.config.checkpoint.every * self.seconds.total)

    def gpu_hours(self, samples: float) -> float:
        """Return the hours of one accelerator that training on this many samples costs."""
        return samples / self.samples_per_second * self.ranks / 3600


def make_plan(
    config: RunConfig, ranks: int, hardware: Hardware, ranks_per_node: int, imbalance: float = 1.0
) -> Plan:
    """Plan a valid configuration on ``ranks`` accelerators.

    Args:
        imbalance: how many times as many tokens as on average the experts of the planned ranks get, where experts are spread over ranks.

    Raises:
        UserError: it has something that a plan does not know, or the imbalance is more than ranks that share experts can have.
    """
    check_known(config)
    shared = config.parallel.expert_model_parallel_size
    if not 1 <= imbalance <= shared:
        raise UserError(
            f"--imbalance {imbalance:g} is not between 1 and parallel.expert_model_parallel_size={shared}, where one rank's experts get all tokens."
        )
    config = on_gpu(config)
    parallel = config.parallel
    stages = parallel.pipeline_model_parallel_size
    usages = [dry_run(config, stage * (ranks // stages), ranks, imbalance) for stage in range(stages)]
    reduce, gather = overlaps(config)
    times = [stage_time(usage, hardware, ranks_per_node, reduce, gather) for usage in usages]
    chunks = parallel.virtual_pipeline_model_parallel_size
    return Plan(
        config, hardware, ranks, usages, pipeline_time(times, usages[0].micro_batches, chunks), ranks_per_node
    )


def check_known(config: RunConfig) -> None:
    """Check that a plan knows all of a run.

    Raises:
        UserError: DeepSpeed keeps something on the host, the precision is of eight or four bits, or pictures have several sizes.
    """
    if config.deepspeed.offload_optimizer or config.deepspeed.offload_parameters:
        raise UserError(
            "rmoe plan counts the memory of GPUs and cannot tell that of their host from it; set deepspeed.offload_optimizer=false and "
            "deepspeed.offload_parameters=false."
        )
    if config.precision.is_below_bf16:
        raise UserError(
            f"rmoe plan counts in fp32 and bf16, not precision={config.precision.value}; set precision=bf16."
        )
    if config.training.stages or config.data.buckets is not None:
        raise UserError(
            "rmoe plan counts steps of one size of picture; set training.stages=[] and data.buckets=null, and model.sample_size to "
            "the largest."
        )


def on_gpu(config: RunConfig) -> RunConfig:
    """Return a configuration with the precision that it has on every GPU."""
    return replace(config, precision=Precision.bf16) if config.precision is Precision.auto else config


def overlaps(config: RunConfig) -> tuple[bool, bool]:
    """Return whether gradients are reduced, and parameters gathered, while passes go on."""
    if config.engine is EngineName.megatron:
        return config.parallel.overlap_grad_reduce, config.parallel.overlap_param_gather
    # DeepSpeed's third stage overlaps unless it is told not to, the others only if they are told to.
    stage = config.deepspeed.zero_stage
    overlaps = bool((config.deepspeed.engine_options or {}).get("overlap_comm", stage == 3))
    return overlaps, overlaps and stage == 3


def figures(plan: Plan, storage: Storage) -> dict[str, object]:
    """Return everything that a plan says as plain values, for JSON; bytes and seconds.

    Args:
        storage: what the run reads and writes.
    """
    parallel, training = plan.config.parallel, plan.config.training
    return {
        "gpu": plan.hardware.name,
        "gpus": plan.ranks,
        "layout": {
            "tensor": parallel.tensor_model_parallel_size,
            "pipeline": parallel.pipeline_model_parallel_size,
            "context": parallel.context_parallel_size,
            "expert": parallel.expert_model_parallel_size,
            "data": data_parallel_size(parallel, plan.ranks),
            "micro_batch_size": training.micro_batch_size,
            "global_batch_size": training.global_batch_size,
            "recompute": training.recompute.value,
        },
        "fits": plan.fits,
        "memory": {"of_gpu": plan.hardware.memory, "usable": USABLE * plan.hardware.memory},
        "stages": [
            {
                "rank": stage.rank,
                **{kind: getattr(stage, kind) for kind in MEMORY_KINDS},
                "peak": stage.peak,
                "at_peak": [
                    {"part": place.part, "phase": place.phase, "bytes": size}
                    for place, size in sorted(stage.at_peak.items())
                ],
                "operations": [
                    {
                        **each._asdict(),
                        "count": count,
                        "seconds": count * operation_seconds(each, plan.hardware),
                    }
                    for each, count in sorted(stage.operations.items())
                ],
                "collectives": [
                    {
                        "kind": each.kind,
                        "phase": each.phase,
                        "bytes": each.bytes,
                        "ranks": len(each.ranks),
                        "count": count,
                        "seconds": count * message_seconds(each, plan.hardware, plan.ranks_per_node),
                        "hides_behind": hides_behind(each, *overlaps(plan.config)),
                    }
                    for each, count in sorted(stage.collectives.items())
                ],
            }
            for stage in plan.stages
        ],
        "seconds": {**asdict(plan.seconds), "total": plan.seconds.total},
        "samples_per_second": plan.samples_per_second,
        "mfu": plan.mfu,
        "data_bytes_per_second": storage.sample and storage.sample * plan.samples_per_second,
        "checkpoint": {
            "bytes": storage.checkpoint,
            "seconds": storage.checkpoint / plan.hardware.storage,
            "share_of_time": plan.checkpoint_share(storage.checkpoint),
        },
    }


MEMORY_KINDS = ("parameters", "gradients", "optimizer", "averages", "activations")
