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

    # The folder of the run whose weights this one starts from.
    base: str = MISSING
    trainable: Trainable = Trainable.added
    # With trainable=blocks, the blocks that are trained.
    blocks: list[int] = field(default_factory=list)


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

    # The sizes, each WIDTHxHEIGHT in pixels; empty makes them from the next two keys.
    sizes: list[str] = field(default_factory=list)
    # The sides of buckets that are made are multiples of it, in pixels.
    multiple: int = number(64, least=1, most=4096)
    # Buckets are made up to this ratio of the longer to the shorter side.
    max_aspect_ratio: float = number(2.0, least=1, most=16)
    # So many draws in a row are of one bucket; null is a global batch.
    batch: int | None = number(None, least=1, most=10**7)


@dataclass
class MixedDatasetConfig:
    """One data set of a mixture.

    Either every entry has a weight (its share of the samples) or every entry has epochs (how often it is repeated relative to
    the others).
    """

    # The folder of .tar shards, or its URL.
    path: str = MISSING
    # The data set's share of the samples, relative to the other weights.
    weight: float | None = number(None, above=0, most=1.0e9)
    # How often the data set is repeated, relative to the others.
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
    # So many parts of a picture along its longer side are taken, each a sample.
    crops: int = number(1, least=1, most=16)
    # Each picture is also mirrored, as a sample of its own.
    flips: bool = False


@dataclass
class AugmentConfig:
    """How the picture of a raw training sample changes, anew in every draw: a function of seed and draw, in any layout."""

    # Left and right are exchanged in half of the draws.
    flips: bool = False
    # The part that is kept lies anywhere along the longer side, not in its middle.
    crops: bool = False


@dataclass
class DataConfig:
    """WebDataset shards of images with captions, raw or precomputed (``rmoe data precompute``)."""

    # The folder of .tar shards, or its URL (s3://, gs://, https://).
    train: str | None = None
    # Several data sets instead of train.
    mixture: list[MixedDatasetConfig] = field(default_factory=list)
    # Pictures of many aspect ratios; null cuts every picture to the model's square.
    buckets: BucketsConfig | None = None
    # The folder of shards that the validation loss is measured on; null measures none.
    validation: str | None = None
    # Where captions come from: txt, caption or json:KEY, each with =WEIGHT behind it or without; a sample
    # takes one of those it has.
    captions: list[str] = field(default_factory=lambda: ["txt"])
    # Which raw samples are trained on, for instance "width >= 512 and aesthetic > 5"; null takes all.
    filter: str | None = None
    # Pictures that are smaller than the model's are enlarged; otherwise they are left out.
    upscale: bool = False
    bad_samples: BadSamplesPolicy = BadSamplesPolicy.skip
    # If more than this share of the samples drawn cannot be used, the run ends.
    max_bad_fraction: float = number(0.05, least=0, most=1)
    # Samples come in a random order, a new one in every epoch; otherwise they come one after the other.
    shuffle: bool = True
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    precompute: PrecomputeConfig = field(default_factory=PrecomputeConfig)
    # A folder of this machine that keeps what is read of URLs; null keeps nothing.
    cache: str | None = None
    # The cache takes so many gigabytes at most.
    cache_gigabytes: float = number(100, above=0, most=1.0e7)
    # So many processes of each rank load data; 0 loads it in the rank's own process.
    num_workers: int = number(0, least=0, most=256, why="each is a process of this host")


@dataclass
class GroupLearningRates:
    """Peak learning rates of parts of the model; null is ``optimizer.learning_rate``, whose schedule they follow in proportion.

    ``gate``: the gates of the recurrence; ``recurrence``: all else that it adds; ``base``: everything else.
    """

    # The peak learning rate of everything that is not added to the base model.
    base: float | None = number(None, above=0, most=1000)
    # The peak learning rate of what the recurrence adds, except for its gates.
    recurrence: float | None = number(None, above=0, most=1000)
    # The peak learning rate of the gates.
    gate: float | None = number(None, above=0, most=1000)


MUON_MOMENTUM = 0.95


@dataclass
class OptimizerConfig:
    """The optimizer, linear warm-up and a decay of the learning rate, and an exponential moving average of the weights."""

    name: OptimizerName = OptimizerName.adamw
    # The peak learning rate.
    learning_rate: float = number(MISSING, above=0, most=1000)
    group_learning_rates: GroupLearningRates = field(default_factory=GroupLearningRates)
    # The learning rate that the decay ends at.
    min_learning_rate: float = number(0.0, least=0, most=1000)
    # The learning rate rises linearly from 0 over so many steps.
    warmup_steps: int = number(0, least=0, most=10**9)
    lr_decay_style: LearningRateDecay = LearningRateDecay.cosine
    # With lr_decay_style=wsd, which needs it, the learning rate falls over so many last steps.
    wsd_decay_steps: int | None = number(None, least=1, most=10**9)
    # The weight decay of AdamW, and of Muon where that is used.
    weight_decay: float = number(0.0, least=0, most=1000)
    # The momentum of Muon.
    muon_momentum: float = number(MUON_MOMENTUM, least=0, below=1)
    # AdamW's decay of the mean of gradients.
    beta1: float = number(0.9, least=0, below=1)
    # AdamW's decay of the mean of their squares.
    beta2: float = number(0.999, least=0, below=1)
    # AdamW adds it to the root of the mean of squares, against division by zero.
    eps: float = number(1.0e-8, above=0, most=1)
    # The gradient of a step is scaled down to this norm if it is longer; 0 clips nothing.
    clip_grad: float = number(1.0, least=0, most=1.0e9)
    # The decay of the weights' moving average.
    ema_decay: float = number(0.999, least=0, most=1)
    # The decay is 1 - (1 + step) ** -power up to ema_decay; null is constant after a ramp.
    ema_power: float | None = number(None, least=0, most=100)
    # The state of the optimizer is spread over the data-parallel ranks.
    distributed_optimizer: bool = True


@dataclass
class StageConfig:
    """Some steps of a run at a resolution of their own; what is null is as in the sections ``training`` and ``data``."""

    # The steps of this stage.
    steps: int = number(MISSING, least=1, most=10**9)
    # The side of the square latents in this stage.
    sample_size: int = number(MISSING, least=1, most=4096)
    # The samples of a rank and forward pass; null is as in training.
    micro_batch_size: int | None = number(None, least=1, most=1 << 16)
    # The samples of an optimizer step; null is as in training.
    global_batch_size: int | None = number(None, least=1, most=10**7)
    # The folder of .tar shards of this stage, as latents are precomputed for one resolution; null is as in
    # data.
    train: str | None = None
    # The folder of validation shards of this stage; null is as in data.
    validation: str | None = None


@dataclass
class EvaluationConfig:
    """A benchmark that the averaged weights are scored by between steps."""

    # The benchmark: shapes, mazes, geneval, geneval2, dpg, corebench or pickscore.
    name: str = MISSING
    # The model is scored after so many optimizer steps, and after the last.
    every: int = number(1000, least=1, most=10**9)
    # So many prompts are taken (of shapes, of each split), their tasks in turn.
    limit: int = number(120, least=6, most=10_000)
    # The table or folder of the benchmark's prompts, for pickscore a text file with one in a line; shapes
    # has none.
    data: str | None = None
    # Folders or hub repositories of its judges, as rmoe eval takes them; empty takes the published ones.
    judges: list[str] = field(default_factory=list)


@dataclass
class TrainingConfig:
    """Length and batch of the run, and what is looked at on the way."""

    # The optimizer steps of the run.
    steps: int = number(MISSING, least=1, most=10**9)
    # The samples of a rank and forward pass.
    micro_batch_size: int = number(MISSING, least=1, most=1 << 16)
    # The samples of an optimizer step over all ranks.
    global_batch_size: int = number(MISSING, least=1, most=10**7)
    # Resolutions one after the other; empty trains at the model's throughout.
    stages: list[StageConfig] = field(default_factory=list)
    recompute: Recompute = Recompute.none
    # Blocks pass through torch.compile: the first steps take minutes, the others less time.
    compile: bool = False
    # The run ends after so many steps in a row whose loss or gradient is not finite.
    max_skipped_steps: int = number(8, least=1, most=10**6)
    # Metrics are logged every so many steps.
    log_every: int = number(10, least=1, most=10**9)
    # The validation loss is measured every so many steps.
    validate_every: int = number(500, least=1, most=10**9)
    # The validation loss is the mean over so many samples, or all that there are.
    validation_samples: int = number(512, least=1, most=10**9)
    # Pictures are drawn every so many steps.
    sample_every: int = number(1000, least=1, most=10**9)
    # The prompts of these pictures, or the class labels of a DiT; empty draws none.
    sample_prompts: list[str] = field(default_factory=list)
    # Benchmarks that the averaged weights are scored by between steps.
    evaluations: list[EvaluationConfig] = field(default_factory=list)
    # The steps of the sampler for these pictures.
    sample_steps: int = number(20, least=1, most=1000, why="DDPM has 1000 timesteps")
    # The scale of classifier-free guidance for these pictures.
    sample_guidance: float = number(2.0, least=-1000, most=1000)


@dataclass
class ParallelConfig:
    """Sizes of Megatron-Core's process groups; data parallelism is what remains of the world size."""

    # So many ranks share every layer's weights.
    tensor_model_parallel_size: int = number(1, least=1, most=1 << 16)
    # The ranks that share weights also share the tokens between layers.
    sequence_parallel: bool = False
    # So many ranks share the tokens of a sample.
    context_parallel_size: int = number(1, least=1, most=1 << 16)
    # The blocks are spread over so many stages.
    pipeline_model_parallel_size: int = number(1, least=1, most=1 << 16)
    # A stage has so many chunks of the model, in the interleaved schedule.
    virtual_pipeline_model_parallel_size: int = number(1, least=1, most=1 << 16)
    # The experts are spread over so many ranks.
    expert_model_parallel_size: int = number(1, least=1, most=1 << 16)
    # Gradients are reduced while the backward pass goes on.
    overlap_grad_reduce: bool = False
    # Updated parameters are gathered while the next forward pass goes on.
    overlap_param_gather: bool = False
    # So many parameters are reduced at a time; null is Megatron-Core's choice.
    bucket_size: int | None = number(None, least=1, most=1 << 40)


@dataclass
class Fp8Config:
    """What the FP8 precisions (and NVFP4's) do. Gate, modulations and the final layer stay in bf16 and float32."""

    recipe: Fp8Recipe = Fp8Recipe.tensorwise
    # The products of so many first blocks stay in bf16.
    num_layers_at_start_in_bf16: int = number(1, least=0, most=1024)
    # The products of so many last blocks stay in bf16.
    num_layers_at_end_in_bf16: int = number(1, least=0, most=1024)


@dataclass
class DeepSpeedConfig:
    """What DeepSpeed's ZeRO shards over the data-parallel ranks, and what it keeps in the host's memory.

    Stage 1 shards the optimizer's state, 2 the gradients too, 3 also the parameters.
    """

    # ZeRO's stage: 1 shards the optimizer's state, 2 the gradients too, 3 also the parameters.
    zero_stage: int = number(1, least=1, most=3)
    # The optimizer's state and update lie on the host.
    offload_optimizer: bool = False
    # At stage 3, parameters that are not in use lie on the host.
    offload_parameters: bool = False
    # More of DeepSpeed's zero_optimization section, for instance {reduce_bucket_size: 50000000}.
    engine_options: dict[str, Any] | None = None


@dataclass
class CheckpointConfig:
    """Megatron-Core distributed checkpoints in ``RUN/checkpoints``."""

    # A checkpoint is saved every so many optimizer steps, and after the last.
    every: int = number(500, least=1, most=10**9)
    # So many checkpoints are kept; older ones are removed.
    keep_last: int = number(2, least=1, most=10**6)
    # Beside them those of steps that this number divides are kept; null keeps none of them. It is a multiple of every.
    keep_every: int | None = number(None, least=1, most=10**9)
    # Beside them so many of the least validation loss are kept. It needs training.validate_every to divide every.
    keep_best: int = number(0, least=0, most=10**6)


@dataclass
class LoggingConfig:
    """JSONL metrics are always written; TensorBoard and wandb are optional."""

    # Metrics are also written for TensorBoard.
    tensorboard: bool = True
    # The arguments of wandb.init, for instance {project: rmoe, mode: offline}; null uses no wandb.
    wandb: dict[str, Any] | None = None


@dataclass
class RunConfig(ModelDescription):
    """One training run, whole: a model, and how it is trained."""

    # The folder of the run: its configuration, checkpoints, history and pictures.
    run_dir: str = MISSING
    # All random numbers of the run follow from it.
    seed: int = number(0, least=0, most=(1 << 32) - 1, why="seeds have 32 bits")
    precision: Precision = Precision.fp32
    fp8: Fp8Config = field(default_factory=Fp8Config)
    backend: Backend = Backend.auto
    engine: EngineName = EngineName.megatron
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    device: Device = Device.auto
    # Training that starts from the weights of another run, trained or imported; null trains from scratch.
    fine_tuning: FineTuningConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
