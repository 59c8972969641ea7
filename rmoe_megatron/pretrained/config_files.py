"""What the configuration files of diffusers and transformers may say, as types with bounds.

The bounds are far above every published model and low enough that no file can ask for more memory or time than a
machine has. Keys that are not described here are kept; diffusers ignores those that it does not know.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from pydantic import Field, TypeAdapter, with_config

from rmoe_megatron.errors import UserError
from rmoe_megatron.files.untrusted import CLOSED, OPEN, check_value, read_json, shown

MAX_LAYERS = 256
MAX_INTEGER = 1 << 31
# Keys by which a configuration asks for code of its own, for kernels from the hub, or for another package's weights.
CODE_KEYS = {
    "auto_map",
    "custom_pipelines",
    "attn_implementation",
    "_attn_implementation",
    "quantization_config",
}

Layers = Annotated[int, Field(ge=1, le=MAX_LAYERS)]
Width = Annotated[int, Field(ge=1, le=1 << 16)]  # of a stream of features
Heads = Annotated[int, Field(ge=1, le=1024)]
Side = Annotated[int, Field(ge=1, le=8192)]  # of an image or its latents
Few = Annotated[int, Field(ge=1, le=64)]
Rows = Annotated[int, Field(ge=1, le=10_000_000)]  # of a vocabulary or a table of classes
Timesteps = Annotated[int, Field(ge=1, le=100_000)]
Finite = Annotated[float, Field(ge=-1e9, le=1e9)]
Positive = Annotated[float, Field(gt=0, le=1e9)]
Fraction = Annotated[float, Field(ge=0, le=1)]


@with_config(CLOSED)
class RecurrenceSettings(TypedDict):
    """The argument ``recurrence`` of this package's transformers."""

    layers: Annotated[list[Annotated[int, Field(ge=0, lt=MAX_LAYERS)]], Field(max_length=MAX_LAYERS)]
    num_modules: Annotated[int, Field(ge=1, le=1024)]
    steps: Few
    rank: Width | None
    modulation: bool
    gate_inputs: Annotated[
        list[Literal["tokens", "unmodulated_tokens", "conditioning"]], Field(min_length=1, max_length=2)
    ]


@with_config(CLOSED)
class LoopSettings(TypedDict):
    """The argument ``loop`` of this package's SD3 transformer."""

    first: Annotated[int, Field(ge=0, lt=MAX_LAYERS)]
    last: Annotated[int, Field(ge=0, lt=MAX_LAYERS)]
    times: Few
    recall: bool


@with_config(OPEN)
class TransformerConfig(TypedDict):
    """What the configurations of all transformers have."""

    _class_name: str
    sample_size: Side
    patch_size: Few
    in_channels: Width
    num_layers: Layers
    attention_head_dim: Heads
    num_attention_heads: Heads
    out_channels: NotRequired[Width | None]
    recurrence: NotRequired[RecurrenceSettings | None]
    loop: NotRequired[LoopSettings | None]


@with_config(OPEN)
class AutoencoderConfig(TypedDict, total=False):
    """AutoencoderKL."""

    in_channels: Heads
    out_channels: Heads
    down_block_types: Annotated[
        list[Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]], Field(min_length=1, max_length=8)
    ]
    up_block_types: Annotated[
        list[Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]], Field(min_length=1, max_length=8)
    ]
    block_out_channels: Annotated[
        list[Annotated[int, Field(ge=1, le=8192)]], Field(min_length=1, max_length=8)
    ]
    layers_per_block: Few
    act_fn: Literal["silu", "swish", "mish", "gelu", "relu"]
    latent_channels: Heads
    norm_num_groups: Heads
    sample_size: Side
    scaling_factor: Positive
    shift_factor: Finite | None
    latents_mean: Annotated[list[Finite], Field(max_length=1024)] | None
    latents_std: Annotated[list[Finite], Field(max_length=1024)] | None
    force_upcast: bool
    use_quant_conv: bool
    use_post_quant_conv: bool
    mid_block_add_attention: bool


@with_config(OPEN)
class PixelCodecConfig(TypedDict, total=False):
    """PixelCodec."""

    scaling_factor: Positive
    shift_factor: Finite | None
    latent_channels: Heads


@with_config(OPEN)
class FlowMatchEulerConfig(TypedDict, total=False):
    """FlowMatchEulerDiscreteScheduler."""

    num_train_timesteps: Timesteps
    shift: Positive
    use_dynamic_shifting: bool
    base_shift: Finite | None
    max_shift: Finite | None
    base_image_seq_len: Rows
    max_image_seq_len: Rows
    invert_sigmas: bool
    shift_terminal: Fraction | None
    use_karras_sigmas: bool | None
    use_exponential_sigmas: bool | None
    use_beta_sigmas: bool | None
    time_shift_type: Literal["exponential", "linear"]
    stochastic_sampling: bool


@with_config(OPEN)
class BetaScheduleConfig(TypedDict, total=False):
    """What DDPMScheduler, DDIMScheduler and DPMSolverMultistepScheduler share."""

    num_train_timesteps: Timesteps
    beta_start: Annotated[float, Field(gt=0, lt=1)]
    beta_end: Annotated[float, Field(gt=0, lt=1)]
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]
    trained_betas: (
        Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1, max_length=100_000)] | None
    )
    prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"]
    thresholding: bool
    dynamic_thresholding_ratio: Fraction
    sample_max_value: Positive
    timestep_spacing: Literal["linspace", "leading", "trailing"]
    steps_offset: Annotated[int, Field(ge=0, le=1000)]
    rescale_betas_zero_snr: bool
    variance_type: (
        Literal[
            "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"
        ]
        | None
    )
    clip_sample: bool
    clip_sample_range: Positive
    set_alpha_to_one: bool


@with_config(OPEN)
class DPMSolverConfig(BetaScheduleConfig, total=False):
    """DPMSolverMultistepScheduler."""

    solver_order: Annotated[int, Field(ge=1, le=3)]
    algorithm_type: Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"]
    solver_type: Literal["midpoint", "heun"]
    lower_order_final: bool
    euler_at_final: bool
    use_karras_sigmas: bool | None
    use_exponential_sigmas: bool | None
    use_beta_sigmas: bool | None
    use_lu_lambdas: bool | None
    use_flow_sigmas: bool | None
    flow_shift: Positive
    final_sigmas_type: Literal["zero", "sigma_min"] | None
    lambda_min_clipped: Annotated[float, Field(le=1e9)]  # minus infinity by default
    use_dynamic_shifting: bool
    time_shift_type: Literal["exponential"]


@with_config(OPEN)
class TextEncoderConfig(TypedDict, total=False):
    """A transformers encoder: CLIPTextConfig, T5Config, BertConfig and their like."""

    model_type: str
    architectures: list[str] | None
    vocab_size: Rows
    hidden_size: Width
    intermediate_size: Annotated[int, Field(ge=1, le=1 << 18)]
    projection_dim: Width
    num_hidden_layers: Layers
    num_attention_heads: Heads
    max_position_embeddings: Annotated[int, Field(ge=1, le=1 << 20)]
    type_vocab_size: Annotated[int, Field(ge=0, le=1 << 16)]
    d_model: Width
    d_kv: Width
    d_ff: Annotated[int, Field(ge=1, le=1 << 18)]
    num_layers: Layers
    num_decoder_layers: Layers | None
    num_heads: Heads
    relative_attention_num_buckets: Width
    relative_attention_max_distance: Rows
    layer_norm_eps: Fraction
    layer_norm_epsilon: Fraction
    hidden_act: str
    feed_forward_proj: str
    dtype: Literal["float32", "float16", "bfloat16", "float64"] | None
    torch_dtype: Literal["float32", "float16", "bfloat16", "float64"] | None


@with_config(OPEN)
class TokenizerConfig(TypedDict, total=False):
    """``tokenizer_config.json``."""

    tokenizer_class: str | None
    model_max_length: Annotated[float, Field(ge=1, le=1e31)]  # 1e30 where there is none


AUTOENCODERS: dict[str, TypeAdapter[Any]] = {
    "AutoencoderKL": TypeAdapter(AutoencoderConfig),
    "PixelCodec": TypeAdapter(PixelCodecConfig),
}
SCHEDULERS: dict[str, TypeAdapter[Any]] = {
    "FlowMatchEulerDiscreteScheduler": TypeAdapter(FlowMatchEulerConfig),
    "DPMSolverMultistepScheduler": TypeAdapter(DPMSolverConfig),
    "DDPMScheduler": TypeAdapter(BetaScheduleConfig),
    "DDIMScheduler": TypeAdapter(BetaScheduleConfig),
}
OBJECT = TypeAdapter(dict[str, Any])
TEXT_ENCODER = TypeAdapter(TextEncoderConfig)
TOKENIZER = TypeAdapter(TokenizerConfig)


def read_config(path: Path, models: dict[str, TypeAdapter[Any]]) -> dict[str, Any]:
    """Read a diffusers configuration, whose ``_class_name`` says which of ``models`` it is.

    Raises:
        UserError: the file cannot be read, is of another class, or has a value that its class cannot have.
    """
    # DPM-Solver's lambda_min_clipped is minus infinity.
    return check_config(read_json(path, OBJECT, allow_infinite=True), models, path)


def check_config(named: dict[str, Any], models: dict[str, TypeAdapter[Any]], path: Path) -> dict[str, Any]:
    """Check a configuration of diffusers; see :func:`read_config`."""
    name = named.get("_class_name")
    if not isinstance(name, str) or name not in models:
        raise UserError(f"{path} describes a {shown(name)}; supported are {', '.join(models)}.")
    return _checked(named, models[name], path)


def read_text_encoder_config(path: Path) -> dict[str, Any]:
    """Read the configuration of a transformers encoder.

    Raises:
        UserError: the file cannot be read, or has a value that no encoder has.
    """
    values = _checked(read_json(path, OBJECT), TEXT_ENCODER, path)
    if not values.get("model_type"):
        raise UserError(f"{path} has no value for model_type; it is no configuration of transformers.")
    return values


def read_tokenizer_config(path: Path) -> dict[str, Any]:
    """Read ``tokenizer_config.json``.

    Raises:
        UserError: the file cannot be read, or has a value that no tokenizer has.
    """
    return _checked(read_json(path, OBJECT), TOKENIZER, path)


def _checked(values: dict[str, Any], model: TypeAdapter[Any], path: Path) -> dict[str, Any]:
    typed: dict[str, Any] = check_value(values, model, str(path))
    check_unknown_keys(typed, path)
    return typed


def check_unknown_keys(values: object, path: Path) -> None:
    """Refuse what asks for code, at any depth, and whole numbers that no size is."""
    if isinstance(values, list):
        for value in values:
            check_unknown_keys(value, path)
    if not isinstance(values, dict):
        return
    for key, value in values.items():
        if key in CODE_KEYS and value is not None:
            raise UserError(f"{path} has {key}, which asks for code or weights from elsewhere; remove it.")
        limit = MAX_LAYERS if "layer" in key else MAX_INTEGER
        if isinstance(value, int) and abs(value) > limit:
            raise UserError(f"{path} has {key} {shown(value)}, but it must lie between {-limit} and {limit}.")
        check_unknown_keys(value, path)
