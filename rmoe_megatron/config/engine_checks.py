"""What each engine can do: the rules that refuse the rest, and the table that says so."""

from collections.abc import Callable
from dataclasses import dataclass

from rmoe_megatron.config.model import DepthLoss
from rmoe_megatron.config.require import require
from rmoe_megatron.config.run import DeepSpeedConfig, EngineName, OptimizerName, Recompute, RunConfig

ZERO_STAGES = (1, 2, 3)


@dataclass(frozen=True)
class Rule:
    """Something that DeepSpeed's engine does not do, or at some stages of ZeRO only."""

    what: str  # in the table
    key: str  # of the configuration
    is_asked: Callable[[RunConfig], bool]
    why: str  # a clause
    stages: tuple[int, ...] = ZERO_STAGES  # where it is refused


_SHARDS_DATA = "DeepSpeed's engine shards over data-parallel ranks alone"
_NOT_TESTED = "no test compares it with Megatron-Core's engine"
RULES = (
    Rule("tensor and sequence parallelism", "parallel.tensor_model_parallel_size", lambda config: config.parallel.tensor_model_parallel_size > 1, _SHARDS_DATA),
    Rule("context parallelism", "parallel.context_parallel_size", lambda config: config.parallel.context_parallel_size > 1, _SHARDS_DATA),
    Rule("pipeline parallelism", "parallel.pipeline_model_parallel_size", lambda config: config.parallel.pipeline_model_parallel_size > 1, _SHARDS_DATA),
    Rule(
        "expert parallelism", "parallel.expert_model_parallel_size", lambda config: config.parallel.expert_model_parallel_size > 1,
        "DeepSpeed shards every parameter over all ranks there", (3,),
    ),
    Rule(
        "overlapped communication by Megatron-Core", "parallel.overlap_grad_reduce",
        lambda config: config.parallel.overlap_grad_reduce or config.parallel.overlap_param_gather,
        "DeepSpeed has its own (deepspeed.engine_options.overlap_comm)",
    ),
    Rule(
        "Muon", "optimizer.name=muon", lambda config: config.optimizer.name is OptimizerName.muon,
        "ZeRO cuts parameters flat, and Muon needs whole matrices",
    ),
    Rule(
        "a replicated optimizer", "optimizer.distributed_optimizer=false", lambda config: not config.optimizer.distributed_optimizer,
        "every stage of ZeRO shards its state",
    ),
    Rule(
        "FP8 and NVFP4, emulated or not", "precision", lambda config: config.precision.is_below_bf16,
        _NOT_TESTED,
    ),
    Rule(
        "loops of blocks, and losses of several depths", "loop and diffusion.depth_loss",
        lambda config: config.loop is not None or config.diffusion.depth_loss is not DepthLoss.last, _NOT_TESTED,
    ),
    Rule("compiled blocks", "training.compile", lambda config: config.training.compile, _NOT_TESTED),
    Rule(
        "recomputed attention", "training.recompute=selective", lambda config: config.training.recompute is Recompute.selective,
        "gradients come in several parts, and DeepSpeed reduces each parameter's once; full works", (2, 3),
    ),
    Rule(
        "parameters on the host", "deepspeed.offload_parameters", lambda config: config.deepspeed.offload_parameters,
        "parameters are whole on every rank at stages 1 and 2", (1, 2),
    ),
)  # fmt: skip


def check_engine(config: RunConfig) -> None:
    """Check that the engine can do what is asked.

    Raises:
        UserError: names the key and the reason.
    """
    if config.engine is EngineName.megatron:
        require(
            config.deepspeed == DeepSpeedConfig(),
            "The section deepspeed is for engine=deepspeed, but engine is megatron; leave it out or change the engine.",
        )
        return
    stage = config.deepspeed.zero_stage
    for rule in RULES:
        others = [str(each) for each in ZERO_STAGES if each not in rule.stages]
        other = f"deepspeed.zero_stage={' or '.join(others)}" if others else "engine=megatron"
        require(
            stage not in rule.stages or not rule.is_asked(config),
            f"{rule.key} is not for engine=deepspeed with deepspeed.zero_stage={stage}: {rule.why}; leave it out, or set {other}.",
        )


def engine_table() -> str:
    """Return the rules as a table in markdown: a row for each, a column for each engine and stage."""
    rows = ["| | Megatron-Core | ZeRO 1 | ZeRO 2 | ZeRO 3 |", "|---|---|---|---|---|"]
    for rule in RULES:
        megatron = "no" if rule.key.startswith("deepspeed.") else "yes"
        stages = ["no" if stage in rule.stages else "yes" for stage in ZERO_STAGES]
        rows.append(f"| {rule.what} (`{rule.key}`) | {' | '.join([megatron, *stages])} |")
    return "\n".join(rows)
