"""The plan of a layout: what each pipeline stage needs, whether it fits, and how long a step takes."""

from dataclasses import asdict, dataclass, replace

from rmoe_megatron.config.layout_checks import data_parallel_size
from rmoe_megatron.config.run import EngineName, Precision, RunConfig
from rmoe_megatron.errors import UserError
from rmoe_megatron.model.flops import training_flops_per_sample
from rmoe_megatron.planning.dry_run import RankUsage, dry_run
from rmoe_megatron.planning.hardware import Hardware
from rmoe_megatron.planning.step_time import StepTime, pipeline_time, stage_time

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

    def gpu_hours(self, samples: float) -> float:
        """Return the hours of one accelerator that training on this many samples costs."""
        return samples / self.samples_per_second * self.ranks / 3600


def make_plan(config: RunConfig, ranks: int, hardware: Hardware, ranks_per_node: int) -> Plan:
    """Plan a valid configuration on ``ranks`` accelerators.

    Raises:
        UserError: the engine is DeepSpeed's, the precision of eight or four bits, or pictures have several sizes.
    """
    if config.engine is not EngineName.megatron:
        raise UserError("rmoe plan knows Megatron-Core's engine, not DeepSpeed's; set engine=megatron.")
    if config.precision.is_below_bf16:
        raise UserError(
            f"rmoe plan counts in fp32 and bf16, not precision={config.precision.value}; set precision=bf16."
        )
    if config.training.stages or config.data.buckets is not None:
        raise UserError(
            "rmoe plan counts steps of one size of picture; set training.stages=[] and data.buckets=null, and model.sample_size to "
            "the largest."
        )
    if config.precision is Precision.auto:
        config = replace(config, precision=Precision.bf16)  # as on every GPU
    parallel = config.parallel
    stages = parallel.pipeline_model_parallel_size
    usages = [dry_run(config, stage * (ranks // stages), ranks) for stage in range(stages)]
    times = [
        stage_time(
            usage, hardware, ranks_per_node, parallel.overlap_grad_reduce, parallel.overlap_param_gather
        )
        for usage in usages
    ]
    chunks = parallel.virtual_pipeline_model_parallel_size
    return Plan(config, hardware, ranks, usages, pipeline_time(times, usages[0].micro_batches, chunks))


def figures(plan: Plan) -> dict[str, object]:
    """Return everything that a plan says as plain values, for JSON; bytes and seconds."""
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
                "collectives": [
                    {
                        "kind": each.kind,
                        "phase": each.phase,
                        "bytes": each.bytes,
                        "ranks": len(each.ranks),
                        "count": count,
                    }
                    for each, count in sorted(stage.collectives.items())
                ],
            }
            for stage in plan.stages
        ],
        "seconds": {**asdict(plan.seconds), "total": plan.seconds.total},
        "samples_per_second": plan.samples_per_second,
        "mfu": plan.mfu,
    }


MEMORY_KINDS = ("parameters", "gradients", "optimizer", "averages", "activations")
