"""The sections of the configuration that say what a model is, apart from how it is trained.

Numbers carry their bounds; what values mean to each other is checked in :mod:`rmoe_megatron.model.checks`.
"""

import math
from dataclasses import dataclass, field
from enum import Enum

from rmoe_megatron.config.bounds import MISSING, number


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


class DepthLoss(Enum):
    """Which depths (loops, or latent steps without a loop) training decodes.

    ``last``: the deepest; ``every``: all of them; ``drawn``: the deepest, and a shallower one that is drawn for each sample.
    """

    last = "last"
    every = "every"
    drawn = "drawn"


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
    # base of rotary positions in two dimensions, which attention sees besides the embedded ones; null has none
    rope_theta: float | None = number(None, above=1, most=1.0e9)
    # the first text tokens have the rotary positions of the image's patches, row by row; others those of the first one
    text_on_grid: bool = False
    # a head's output loses its part along the token's own value (exclusive self-attention)
    exclusive_attention: bool = False
    dual_attention_layers: list[int] = field(
        default_factory=list
    )  # blocks with SD3.5-medium's second attention
    # DiT
    # the embedding table has one more row, the dropped label
    num_classes: int = number(0, least=0, most=10_000_000)
    learned_sigma: bool = False  # twice the output channels: noise and variance
    # of the timestep's frequencies 10000^(-i / (128 - shift)); the original DiT has 0
    downscale_freq_shift: float = number(1.0, least=0, most=1)
    timestep_scale: float = number(
        1.0, above=0, most=1
    )  # times the timestep, before its features; SiT has 0.001
    shared_conditioning: bool = True  # false: timestep and label embeddings of its own in every block

    @property
    def is_class_conditional(self) -> bool:
        """Whether it draws classes, not texts."""
        return self.num_classes > 0


@dataclass
class RecurrenceConfig:
    """The recursive sparse mixture of experts inside joint attention (arXiv 2604.25299)."""

    layers: list[int] = MISSING  # indices of transformer blocks, first is 0
    num_modules: int = number(5, least=1, most=1024)  # M
    steps: int = number(2, least=1, most=64)  # T, latent steps
    rank: int | None = number(128, least=1, most=1 << 16)  # null makes the modules full-rank
    tau: float = number(5.0, above=0, most=1.0e6)
    modulation: bool = True  # Mod(LN(a)) of the latent step
    # tokens (the latent state), or unmodulated_tokens (the same without adaLN, which carries the timestep), and conditioning
    gate_inputs: list[str] = field(default_factory=lambda: ["tokens", "conditioning"])
    # of B; 0 leaves a base model unchanged, small and positive for training from scratch
    up_init_std: float = number(0.0, least=0, most=10)
    aux_loss_coeff: float = number(0.0, least=0, most=1000)  # load balancing (Switch)
    z_loss_coeff: float = number(0.0, least=0, most=1000)


@dataclass
class LoopConfig:
    """Blocks that are passed several times with the same weights (Looped-DiT, arXiv 2609.40305)."""

    first: int = number(MISSING, least=0, most=1023)  # block, from 0
    last: int = number(MISSING, least=0, most=1023)
    times: int = number(4, least=1, most=64)
    recall: bool = True  # before each pass: a linear map of the state and of what entered the loop


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
    # loops or latent steps
    depth_loss: DepthLoss = DepthLoss.last
    distillation: float = number(
        0.5, least=0, most=1
    )  # share of the distance from the deepest output, for drawn
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
class ModelDescription:
    """What a model is: all that its weights, its output and what it is conditioned on depend on.

    Everything that is not training (import, export, FLOPs, samplers, encoders) needs this and no more.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    recurrence: RecurrenceConfig | None = None
    lora: LoraConfig | None = None
    loop: LoopConfig | None = None
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    encoders: EncodersConfig = field(default_factory=EncodersConfig)
