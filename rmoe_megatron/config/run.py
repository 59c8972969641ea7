"""The configuration of a run as typed dataclasses, one per concern.

Everything a run depends on is here; the resolved tree is saved with every checkpoint. Numbers carry their bounds; these
and what values mean to each other are checked by :mod:`rmoe_megatron.config.validation` before any process group,
download or file is touched.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from rmoe_megatron.config.bounds import MISSING, number
from rmoe_megatron.config.model import ModelDescription


class Precision(Enum):
    """Data type of parameters and activations; the optimizer's main parameters are always float32.

    ``auto``: bf16 on a GPU, on a CPU the faster of bf16 and fp32. It is decided when a run starts and written into the run's
    configuration (:func:`rmoe_megatron.model.precision.backend.resolve_precision`).
    ``fp8``: bf16, but matrix products of the blocks' linear layers take operands of eight bits (Transformer Engine).
    ``fp8_emulated``, ``nvfp4_emulated``: the same in ordinary arithmetic on any device, to see what it does to a model before
    there is hardware for it.
    """

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"
    fp8_emulated = "fp8_emulated"
    nvfp4_emulated = "nvfp4_emulated"

    @property
    def is_emulated(self) -> bool:
        """Whether operands of matrix products are rounded in ordinary arithmetic."""
        return self in (Precision.fp8_emulated, Precision.nvfp4_emulated)

    @property
    def is_below_bf16(self) -> bool:
        """Whether operands of matrix products have eight or four bits, emulated or not."""
        return self is Precision.fp8 or self.is_emulated

    @property
    def parameter_bytes(self) -> int:
        """Bytes of a parameter, at most: those of ``auto`` are not known before the run starts."""
        return 4 if self in (Precision.fp32, Precision.auto) else 2


class Backend(Enum):
    """Whose linear layers the blocks are built of; checkpoints are the same.

    ``local``: Megatron-Core's own; ``transformer_engine``: NVIDIA's; ``auto``: the latter on a GPU where it is installed.
    """

    auto = "auto"
    local = "local"
    transformer_engine = "transformer_engine"


class EngineName(Enum):
    """Who turns micro-batches into updated weights; checkpoints hold the same weights under the same names.

    ``megatron``: Megatron-Core, every parallel layout; ``deepspeed``: DeepSpeed's ZeRO, which shards over data-parallel ranks.
    """

    megatron = "megatron"
    deepspeed = "deepspeed"


class OptimizerName(Enum):
    """What updates the weights.

    ``muon``: Muon for the matrices of blocks, AdamW for all else.
    """

    adamw = "adamw"
    muon = "muon"


class LearningRateDecay(Enum):
    """How the learning rate falls from its peak after the warm-up to ``min_learning_rate`` at the last step.

    ``cosine`` and ``linear``: all the way; ``constant``: not at all; ``wsd`` (warm-up, stable, decay): it keeps its peak and falls
    linearly in the last ``wsd_decay_steps`` steps.
    """

    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    wsd = "wsd"


class Fp8Recipe(Enum):
    """How the scales of eight-bit operands come about; names are Megatron-Core's.

    ``delayed``: of a tensor, from its past; ``tensorwise``: of a tensor, from itself; ``blockwise``: of 1 x 128 values, and of
    128 x 128 weights; ``mxfp8``: a power of two for 32 values (Blackwell).
    """

    delayed = "delayed"
    tensorwise = "tensorwise"
    blockwise = "blockwise"
    mxfp8 = "mxfp8"


class Device(Enum):
    """Where the run happens; ``auto`` takes CUDA if there is a GPU, the CPU otherwise."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Recompute(Enum):
    """What the backward pass computes again instead of keeping it.

    ``selective``: the attention of every block, and all of each intermediate latent step. ``full``: whole blocks.
    """

    none = "none"
    selective = "selective"
    full = "full"


class Trainable(Enum):
    """What fine-tuning trains: the added recurrence or LoRA alone (the base is frozen), some blocks, or everything."""

    added = "added"
    blocks = "blocks"
    all = "all"


@dataclass
class FineTuningConfig:
    """Training that starts from the weights of another run, trained or imported (``rmoe convert from-hf``)."""

    base: str = MISSING  # folder of that run
    trainable: Trainable = Trainable.added
    blocks: list[int] = field(default_factory=list)  # for trainable=blocks


class BadSamplesPolicy(Enum):
    """What a sample that cannot be read or used does: the next one takes its place, or the run ends."""

    skip = "skip"
    stop = "stop"


@dataclass
class BucketsConfig:
    """Pictures of many aspect ratios: each is cut to the size of the nearest bucket, and a micro-batch is of one bucket.

    Without ``sizes`` buckets are made that have at most the pixels of the model's square: sides that are multiples of
    ``multiple``, of every aspect ratio up to ``max_aspect_ratio``.
    """

    sizes: list[str] = field(default_factory=list)  # WIDTHxHEIGHT in pixels
    multiple: int = number(64, least=1, most=4096)
    max_aspect_ratio: float = number(2.0, least=1, most=16)
    # draws in a row that are of one bucket; null is a global batch
    batch: int | None = number(None, least=1, most=10**7)


@dataclass
class MixedDatasetConfig:
    """One data set of a mixture.

    Either every entry has a weight (its share of the samples) or every entry has epochs (how often it is repeated relative to
    the others).
    """

    path: str = MISSING  # folder of .tar shards
    weight: float | None = number(None, above=0, most=1.0e9)
    epochs: float | None = number(None, above=0, most=1.0e9)


class Storage(Enum):
    """Data type of precomputed latents and embeddings."""

    float16 = "float16"
    bfloat16 = "bfloat16"


class Latents(Enum):
    """What is kept of the distribution that an autoencoder gives for a picture.

    ``mean``: its mean. ``distribution``: mean and log-variance, twice the bytes, of which every draw of training takes a sample of its
    own. ``none``: nothing; the pictures are kept, and the texts alone embedded.
    """

    mean = "mean"
    distribution = "distribution"
    none = "none"


@dataclass
class PrecomputeConfig:
    """What ``rmoe data precompute`` makes of a sample."""

    latents: Latents = Latents.mean
    storage: Storage = Storage.float16
    crops: int = number(1, least=1, most=16)  # parts of a picture along its longer side, each a sample
    flips: bool = False  # each also mirrored, as a sample of its own


@dataclass
class AugmentConfig:
    """How the picture of a raw training sample changes, anew in every draw: a function of seed and draw, in any layout."""

    flips: bool = False  # left and right are exchanged in half of the draws
    crops: bool = False  # the part that is kept lies anywhere along the longer side, not in its middle


@dataclass
class DataConfig:
    """WebDataset shards of images with captions, raw or precomputed (``rmoe data precompute``)."""

    train: str | None = None  # folder of .tar shards, or URL of one (s3://, gs://, https://)
    mixture: list[MixedDatasetConfig] = field(default_factory=list)  # instead of train
    buckets: BucketsConfig | None = None  # null: every picture is cut to the model's square
    validation: str | None = None
    # txt, caption or json:KEY, each with =WEIGHT behind it or without; a sample takes one of those it has
    captions: list[str] = field(default_factory=lambda: ["txt"])
    filter: str | None = None  # which raw samples to train on: width >= 512 and aesthetic > 5
    upscale: bool = False  # enlarge images that are smaller than the model's; otherwise they are left out
    bad_samples: BadSamplesPolicy = BadSamplesPolicy.skip
    max_bad_fraction: float = number(0.05, least=0, most=1)  # of the samples drawn; more end the run
    shuffle: bool = True
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    precompute: PrecomputeConfig = field(default_factory=PrecomputeConfig)
    cache: str | None = None  # folder of this machine for what is read of URLs; null keeps nothing
    cache_gigabytes: float = number(100, above=0, most=1.0e7)
    num_workers: int = number(
        0, least=0, most=256, why="each is a process of this host"
    )  # data loading processes per rank


@dataclass
class GroupLearningRates:
    """Peak learning rates of parts of the model; null is ``optimizer.learning_rate``, whose schedule they follow in proportion.

    ``gate``: the gates of the recurrence; ``recurrence``: all else that it adds; ``base``: everything else.
    """

    base: float | None = number(None, above=0, most=1000)
    recurrence: float | None = number(None, above=0, most=1000)
    gate: float | None = number(None, above=0, most=1000)


MUON_MOMENTUM = 0.95


@dataclass
class OptimizerConfig:
    """The optimizer, linear warm-up and a decay of the learning rate, and an exponential moving average of the weights."""

    name: OptimizerName = OptimizerName.adamw
    learning_rate: float = number(MISSING, above=0, most=1000)
    group_learning_rates: GroupLearningRates = field(default_factory=GroupLearningRates)
    min_learning_rate: float = number(0.0, least=0, most=1000)
    warmup_steps: int = number(0, least=0, most=10**9)
    lr_decay_style: LearningRateDecay = LearningRateDecay.cosine
    # the last steps of the run, in which the learning rate falls; for lr_decay_style=wsd, which needs it
    wsd_decay_steps: int | None = number(None, least=1, most=10**9)
    weight_decay: float = number(0.0, least=0, most=1000)
    muon_momentum: float = number(MUON_MOMENTUM, least=0, below=1)
    beta1: float = number(0.9, least=0, below=1)  # this, beta2 and eps are AdamW's
    beta2: float = number(0.999, least=0, below=1)
    eps: float = number(1.0e-8, above=0, most=1)
    clip_grad: float = number(1.0, least=0, most=1.0e9)
    ema_decay: float = number(0.999, least=0, most=1)
    # decay 1 - (1 + step) ** -power up to ema_decay; null is constant after a ramp
    ema_power: float | None = number(None, least=0, most=100)
    distributed_optimizer: bool = True


@dataclass
class StageConfig:
    """Some steps of a run at a resolution of their own; what is null is as in the sections ``training`` and ``data``."""

    steps: int = number(MISSING, least=1, most=10**9)
    sample_size: int = number(MISSING, least=1, most=4096)  # of a side of the square latents
    micro_batch_size: int | None = number(None, least=1, most=1 << 16)
    global_batch_size: int | None = number(None, least=1, most=10**7)
    train: str | None = None  # folders of .tar shards: latents are precomputed for one resolution
    validation: str | None = None


@dataclass
class EvaluationConfig:
    """A benchmark that the averaged weights are scored by between steps."""

    name: str = MISSING  # shapes, mazes, geneval, geneval2, dpg, corebench or pickscore
    every: int = number(1000, least=1, most=10**9)  # optimizer steps; and after the last
    limit: int = number(120, least=6, most=10_000)  # prompts (of shapes: of each split), their tasks in turn
    # table or folder of the benchmark's prompts, for pickscore a text file with one in a line; none for shapes
    data: str | None = None
    # folders or hub repositories of its judges, as of `rmoe eval`; empty are the published ones
    judges: list[str] = field(default_factory=list)


@dataclass
class TrainingConfig:
    """Length and batch of the run, and what is looked at on the way."""

    steps: int = number(MISSING, least=1, most=10**9)
    micro_batch_size: int = number(MISSING, least=1, most=1 << 16)  # samples per rank and forward pass
    global_batch_size: int = number(MISSING, least=1, most=10**7)  # samples per optimizer step over all ranks
    # resolutions one after the other; empty is the model's throughout
    stages: list[StageConfig] = field(default_factory=list)
    recompute: Recompute = Recompute.none
    compile: bool = False  # blocks through torch.compile: the first steps take minutes, the others less time
    # in a row, whose loss or gradient is not finite; then the run ends
    max_skipped_steps: int = number(8, least=1, most=10**6)
    log_every: int = number(10, least=1, most=10**9)
    validate_every: int = number(500, least=1, most=10**9)
    validation_samples: int = number(512, least=1, most=10**9)
    sample_every: int = number(1000, least=1, most=10**9)
    sample_prompts: list[str] = field(default_factory=list)  # class labels for DiT
    evaluations: list[EvaluationConfig] = field(default_factory=list)
    sample_steps: int = number(20, least=1, most=1000, why="DDPM has 1000 timesteps")
    sample_guidance: float = number(2.0, least=-1000, most=1000)


@dataclass
class ParallelConfig:
    """Sizes of Megatron-Core's process groups; data parallelism is what remains of the world size."""

    tensor_model_parallel_size: int = number(1, least=1, most=1 << 16)
    sequence_parallel: bool = False
    context_parallel_size: int = number(1, least=1, most=1 << 16)
    pipeline_model_parallel_size: int = number(1, least=1, most=1 << 16)
    virtual_pipeline_model_parallel_size: int = number(
        1, least=1, most=1 << 16
    )  # model chunks per stage, of the interleaved schedule
    expert_model_parallel_size: int = number(1, least=1, most=1 << 16)
    overlap_grad_reduce: bool = False  # reduce gradients while the backward pass goes on
    overlap_param_gather: bool = False  # gather updated parameters while the next forward pass goes on
    # parameters per overlapped reduction; null is Megatron-Core's choice
    bucket_size: int | None = number(None, least=1, most=1 << 40)


@dataclass
class Fp8Config:
    """What the FP8 precisions (and NVFP4's) do. Gate, modulations and the final layer stay in bf16 and float32."""

    recipe: Fp8Recipe = Fp8Recipe.tensorwise
    # blocks at the start and the end of the model whose products stay in bf16
    num_layers_at_start_in_bf16: int = number(1, least=0, most=1024)
    num_layers_at_end_in_bf16: int = number(1, least=0, most=1024)


@dataclass
class DeepSpeedConfig:
    """What DeepSpeed's ZeRO shards over the data-parallel ranks, and what it keeps in the host's memory.

    Stage 1 shards the optimizer's state, 2 the gradients too, 3 also the parameters.
    """

    zero_stage: int = number(1, least=1, most=3)
    offload_optimizer: bool = False  # state and update of the optimizer on the host
    offload_parameters: bool = False  # stage 3: parameters that are not in use lie on the host
    # more of DeepSpeed's zero_optimization section, for instance {reduce_bucket_size: 50000000}
    engine_options: dict[str, Any] | None = None


@dataclass
class CheckpointConfig:
    """Megatron-Core distributed checkpoints in ``RUN/checkpoints``."""

    every: int = number(500, least=1, most=10**9)  # optimizer steps; the last step is always saved
    keep_last: int = number(2, least=1, most=10**6)


@dataclass
class LoggingConfig:
    """JSONL metrics are always written; TensorBoard and wandb are optional."""

    tensorboard: bool = True
    wandb: dict[str, Any] | None = (
        None  # arguments of wandb.init, for instance {project: rmoe, mode: offline}
    )


@dataclass
class RunConfig(ModelDescription):
    """One training run, whole: a model, and how it is trained."""

    run_dir: str = MISSING
    seed: int = number(0, least=0, most=(1 << 32) - 1, why="seeds have 32 bits")
    precision: Precision = Precision.fp32
    fp8: Fp8Config = field(default_factory=Fp8Config)
    backend: Backend = Backend.auto
    engine: EngineName = EngineName.megatron
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    device: Device = Device.auto
    fine_tuning: FineTuningConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
