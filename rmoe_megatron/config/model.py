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

    # A name in config/presets.py, whose values fill what is not given here.
    preset: str | None = None
    architecture: Architecture = Architecture.mmdit
    # The side of the latents of a square picture.
    sample_size: int = number(MISSING, least=1, most=4096)
    # The side of a patch, in latents.
    patch_size: int = number(MISSING, least=1, most=256)
    # The channels of the latents.
    in_channels: int = number(MISSING, least=1, most=4096)
    # The number of blocks.
    num_layers: int = number(MISSING, least=1, most=1024, why="each is built as a module of its own")
    # The width of a token in the blocks.
    hidden_size: int = number(MISSING, least=1, most=1 << 16)
    # The heads of each attention.
    num_attention_heads: int = number(MISSING, least=1, most=1024)
    # Queries and keys pass an RMSNorm, as in SD3.5.
    qk_norm: bool = True
    # The epsilon of the norms before the MLPs; the original DiT has 1e-6 too, diffusers' DiT 1e-5.
    mlp_norm_eps: float = number(1.0e-6, above=0, most=1)
    # MM-DiT: the tokens of text in the joint sequence.
    text_length: int = number(0, least=0, most=1 << 16)
    # MM-DiT: the width of the text encoder's token states.
    text_hidden_size: int = number(0, least=0, most=1 << 16)
    # MM-DiT: the width of the pooled text embedding.
    pooled_size: int = number(0, least=0, most=1 << 16)
    # MM-DiT: the side of the table of positions, in patches; pictures take a centred crop of it.
    pos_embed_max_size: int = number(0, least=0, most=4096)
    # The base of rotary positions in two dimensions, which attention sees besides the embedded ones; null
    # has none.
    rope_theta: float | None = number(None, above=1, most=1.0e9)
    # The first text tokens have the rotary positions of the picture's patches, row by row; the others have
    # that of the first one.
    text_on_grid: bool = False
    # A head's output loses its part along the token's own value (exclusive self-attention).
    exclusive_attention: bool = False
    # The blocks that have SD3.5-medium's second attention.
    dual_attention_layers: list[int] = field(default_factory=list)
    # DiT: the number of classes; the embedding table has one more row, for the dropped label.
    num_classes: int = number(0, least=0, most=10_000_000)
    # DiT: the output has twice the channels, noise and variance.
    learned_sigma: bool = False
    # DiT: the timestep's frequencies are 10000^(-i / (128 - shift)); the original DiT has 0.
    downscale_freq_shift: float = number(1.0, least=0, most=1)
    # DiT: the timestep is multiplied by it before its features are taken; SiT has 0.001.
    timestep_scale: float = number(1.0, above=0, most=1)
    # DiT: all blocks share one embedding of timestep and label; with false every block has its own.
    shared_conditioning: bool = True

    @property
    def is_class_conditional(self) -> bool:
        """Whether it draws classes, not texts."""
        return self.num_classes > 0


@dataclass
class RecurrenceConfig:
    """The recursive sparse mixture of experts inside joint attention (arXiv 2604.25299)."""

    # The blocks that have the recurrence, counted from 0.
    layers: list[int] = MISSING
    # M, the number of experts of a block.
    num_modules: int = number(5, least=1, most=1024)
    # T, the number of latent steps.
    steps: int = number(2, least=1, most=64)
    # The rank of an expert's projections; null makes them full-rank.
    rank: int | None = number(128, least=1, most=1 << 16)
    # The temperature of the gate's softmax, whose gradient trains it.
    tau: float = number(5.0, above=0, most=1.0e6)
    # Every latent step modulates its state, Mod(LN(a)).
    modulation: bool = True
    # What the gate sees: tokens (the latent state) or unmodulated_tokens (the same without adaLN, which
    # carries the timestep), and conditioning.
    gate_inputs: list[str] = field(default_factory=lambda: ["tokens", "conditioning"])
    # The standard deviation that the experts' second factor starts with; 0 leaves a base model unchanged,
    # and training from scratch takes a small positive one.
    up_init_std: float = number(0.0, least=0, most=10)
    # The weight of the load-balancing loss (Switch).
    aux_loss_coeff: float = number(0.0, least=0, most=1000)
    # The weight of the loss that keeps the gate's logits small.
    z_loss_coeff: float = number(0.0, least=0, most=1000)


@dataclass
class LoopConfig:
    """Blocks that are passed several times with the same weights (Looped-DiT, arXiv 2609.40305)."""

    # The first block of the loop, counted from 0.
    first: int = number(MISSING, least=0, most=1023)
    # The last block of the loop.
    last: int = number(MISSING, least=0, most=1023)
    # How often the loop is passed.
    times: int = number(4, least=1, most=64)
    # Before each pass a linear map joins the state with what entered the loop.
    recall: bool = True


@dataclass
class LoraConfig:
    """Plain low-rank adaptation of the vision Q/K/V projections: the baseline without recurrence."""

    # The blocks that have LoRA, counted from 0.
    layers: list[int] = MISSING
    # The rank of the update.
    rank: int = number(128, least=1, most=1 << 16)


@dataclass
class DiffusionConfig:
    """The objective, its timesteps, and classifier-free guidance dropout."""

    objective: Objective = Objective.rectified_flow
    # The share of captions or labels that training replaces by the empty one.
    guidance_dropout: float = number(0.1, least=0, most=1)
    timestep_density: TimestepDensity = TimestepDensity.logit_normal
    # Rectified flow: the mean of the logit-normal density of timesteps.
    logit_mean: float = number(0.0, least=-100, most=100)
    # Rectified flow: the standard deviation of the logit-normal density.
    logit_std: float = number(1.0, above=0, most=100)
    # Rectified flow: the scale of the density "mode".
    mode_scale: float = number(1.29, least=-1, most=2 / (math.pi - 2), why="where the density exists")
    # Rectified flow: SD3's shift of sigma towards noise.
    shift: float = number(1.0, above=0, most=1000)
    # The sample_size that the shift is for; others scale it by the ratio of sides. Null leaves the shift as
    # it is.
    shift_base_size: int | None = number(None, least=1, most=4096)
    prediction: Prediction = Prediction.velocity
    depth_loss: DepthLoss = DepthLoss.last
    # The share that the distance from the deepest output has in the loss, with depth_loss=drawn.
    distillation: float = number(0.5, least=0, most=1)
    # DDPM: the noise's loss has the weight min(SNR, gamma) / SNR; null leaves it without one.
    min_snr_gamma: float | None = number(None, above=0, most=1.0e6)


@dataclass
class EncodersConfig:
    """Frozen encoders: the names of the embedded defaults, local folders, or hub repositories (owner/name).

    A folder or repository whose model_index.json is a Stable Diffusion 3 pipeline's has three text encoders.
    """

    # The text encoder: minilm, a folder, or a hub repository.
    text_encoder: str = "minilm"
    # Which of SD3's clip_l, clip_g and t5 are not loaded; their states are zeros.
    dropped: list[str] = field(default_factory=list)
    # The autoencoder: pixel (the picture itself), a folder, or a hub repository.
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
