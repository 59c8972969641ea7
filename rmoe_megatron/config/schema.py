"""The configuration of a run as typed dataclasses, one per concern.

Everything a run depends on is here; the resolved tree is saved with every checkpoint. Numbers carry their bounds; these
and what values mean to each other are checked by :mod:`rmoe_megatron.config.validation` before any process group,
download or file is touched.
"""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from rmoe_megatron.config.bounds import number


class Precision(Enum):
    """Data type of parameters and activations; the optimizer's main parameters are always float32."""

    fp32 = "fp32"
    bf16 = "bf16"


class Device(Enum):
    """Where the run happens; ``auto`` takes CUDA if there is a GPU, the CPU otherwise."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Prediction(Enum):
    """What the model's output is: the velocity, or the clean sample from which the velocity follows."""

    velocity = "velocity"
    sample = "sample"


class Architecture(Enum):
    """Text-conditional MM-DiT (Stable Diffusion 3 and 3.5) or class-conditional DiT."""

    mmdit = "mmdit"
    dit = "dit"


class Objective(Enum):
    """What is learned: rectified flow's velocity, or DDPM's noise (with its variance if the model has learned_sigma)."""

    rectified_flow = "rectified_flow"
    ddpm = "ddpm"


class TimestepDensity(Enum):
    """How rectified flow draws its timesteps (Esser et al., 2024, section 3.1)."""

    logit_normal = "logit_normal"
    mode = "mode"
    cosmap = "cosmap"
    uniform = "uniform"


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
class ModelConfig:
    """The transformer. Names follow diffusers' SD3Transformer2DModel and DiTTransformer2DModel."""

    preset: str | None = None  # name in config/presets.py; fills what is not given here
    architecture: Architecture = Architecture.mmdit
    sample_size: int = number(MISSING, least=1, most=4096)  # latent height and width
    patch_size: int = number(MISSING, least=1, most=256)
    in_channels: int = number(MISSING, least=1, most=4096)
    num_layers: int = number(MISSING, least=1, most=1024, why="each is built as a module of its own")
    hidden_size: int = number(MISSING, least=1, most=1 << 16)
    num_attention_heads: int = number(MISSING, least=1, most=1024)
    qk_norm: bool = True  # RMSNorm on queries and keys, as in SD3.5
    mlp_norm_eps: float = number(1.0e-6, above=0, most=1)  # also the original DiT's; diffusers' DiT has 1e-5
    # MM-DiT
    text_length: int = number(0, least=0, most=1 << 16)  # tokens of text in the joint sequence
    text_hidden_size: int = number(0, least=0, most=1 << 16)  # width of the text encoder's token states
    pooled_size: int = number(0, least=0, most=1 << 16)  # width of the pooled text embedding
    pos_embed_max_size: int = number(0, least=0, most=4096)  # in patches; images take a centred crop
    dual_attention_layers: list[int] = field(
        default_factory=list
    )  # blocks with SD3.5-medium's second attention
    # DiT
    # the embedding table has one more row, the dropped label
    num_classes: int = number(0, least=0, most=10_000_000)
    learned_sigma: bool = False  # twice the output channels: noise and variance
    # of the timestep's frequencies 10000^(-i / (128 - shift)); the original DiT has 0
    downscale_freq_shift: float = number(1.0, least=0, most=1)
    shared_conditioning: bool = True  # false: timestep and label embeddings of its own in every block


@dataclass
class RecurrenceConfig:
    """The recursive sparse mixture of experts inside joint attention (arXiv 2604.25299)."""

    layers: list[int] = MISSING  # indices of transformer blocks, first is 0
    num_modules: int = number(5, least=1, most=1024)  # M
    steps: int = number(2, least=1, most=64)  # T, latent steps
    rank: int | None = number(128, least=1, most=1 << 16)  # null makes the modules full-rank
    tau: float = number(5.0, above=0, most=1.0e6)
    modulation: bool = True  # Mod(LN(a)) of the latent step
    gate_inputs: list[str] = field(default_factory=lambda: ["tokens", "conditioning"])
    # of B; 0 leaves a base model unchanged, small and positive for training from scratch
    up_init_std: float = number(0.0, least=0, most=10)
    aux_loss_coeff: float = number(0.0, least=0, most=1000)  # load balancing (Switch)
    z_loss_coeff: float = number(0.0, least=0, most=1000)


@dataclass
class LoraConfig:
    """Plain low-rank adaptation of the vision Q/K/V projections: the baseline without recurrence."""

    layers: list[int] = MISSING
    rank: int = number(128, least=1, most=1 << 16)


@dataclass
class DiffusionConfig:
    """The objective, its timesteps, and classifier-free guidance dropout."""

    objective: Objective = Objective.rectified_flow
    guidance_dropout: float = number(
        0.1, least=0, most=1
    )  # share of captions or labels replaced by the empty one
    # rectified flow
    timestep_density: TimestepDensity = TimestepDensity.logit_normal
    logit_mean: float = number(0.0, least=-100, most=100)
    logit_std: float = number(1.0, above=0, most=100)
    mode_scale: float = number(1.29, least=-1, most=2 / (math.pi - 2), why="where the density exists")
    shift: float = number(1.0, above=0, most=1000)  # SD3's shift of sigma
    # sample_size that ``shift`` is for; others scale it by the ratio of sides
    shift_base_size: int | None = number(None, least=1, most=4096)
    prediction: Prediction = Prediction.velocity
    # DDPM with DiT's linear betas
    min_snr_gamma: float | None = number(
        None, above=0, most=1.0e6
    )  # weight min(SNR, gamma) / SNR of the noise's loss


@dataclass
class EncodersConfig:
    """Frozen encoders: the names of the embedded defaults, local folders, or hub repositories (owner/name).

    A folder or repository whose model_index.json is a Stable Diffusion 3 pipeline's has three text encoders.
    """

    text_encoder: str = "minilm"
    dropped: list[str] = field(default_factory=list)  # of SD3's clip_l, clip_g, t5: zeros instead, not loaded
    autoencoder: str = "pixel"


@dataclass
class FineTuningConfig:
    """Training that starts from the weights of another run, trained or imported (``rmoe convert from-hf``)."""

    base: str = MISSING  # folder of that run
    trainable: Trainable = Trainable.added
    blocks: list[int] = field(default_factory=list)  # for trainable=blocks


@dataclass
class DataConfig:
    """WebDataset shards of images with captions, raw or precomputed (``rmoe data precompute``)."""

    train: str = MISSING  # folder of .tar shards
    validation: str | None = None
    shuffle: bool = True
    num_workers: int = number(
        0, least=0, most=256, why="each is a process of this host"
    )  # data loading processes per rank


@dataclass
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay, and an exponential moving average of the weights."""

    learning_rate: float = number(MISSING, above=0, most=1000)
    min_learning_rate: float = number(0.0, least=0, most=1000)
    warmup_steps: int = number(0, least=0, most=10**9)
    weight_decay: float = number(0.0, least=0, most=1000)
    beta1: float = number(0.9, least=0, below=1)
    beta2: float = number(0.999, least=0, below=1)
    eps: float = number(1.0e-8, above=0, most=1)
    clip_grad: float = number(1.0, least=0, most=1.0e9)
    ema_decay: float = number(0.999, least=0, most=1)
    # decay 1 - (1 + step) ** -power up to ema_decay; null is constant after a ramp
    ema_power: float | None = number(None, least=0, most=100)
    distributed_optimizer: bool = True


@dataclass
class TrainingConfig:
    """Length and batch of the run, and what is looked at on the way."""

    steps: int = number(MISSING, least=1, most=10**9)
    micro_batch_size: int = number(MISSING, least=1, most=1 << 16)  # samples per rank and forward pass
    global_batch_size: int = number(MISSING, least=1, most=10**7)  # samples per optimizer step over all ranks
    recompute: Recompute = Recompute.none
    # in a row, whose loss or gradient is not finite; then the run ends
    max_skipped_steps: int = number(8, least=1, most=10**6)
    log_every: int = number(10, least=1, most=10**9)
    validate_every: int = number(500, least=1, most=10**9)
    validation_samples: int = number(512, least=1, most=10**9)
    sample_every: int = number(1000, least=1, most=10**9)
    sample_prompts: list[str] = field(default_factory=list)  # class labels for DiT
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
class RunConfig:
    """One training run, whole."""

    run_dir: str = MISSING
    seed: int = number(0, least=0, most=(1 << 32) - 1, why="seeds have 32 bits")
    precision: Precision = Precision.fp32
    device: Device = Device.auto
    model: ModelConfig = field(default_factory=ModelConfig)
    recurrence: RecurrenceConfig | None = None
    lora: LoraConfig | None = None
    fine_tuning: FineTuningConfig | None = None
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    encoders: EncodersConfig = field(default_factory=EncodersConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
