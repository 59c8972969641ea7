"""Checks of what a model is: the transformer, what is added to it, and its objective."""

from rmoe_megatron.config.bounds import check_bounds
from rmoe_megatron.config.model import Architecture, ModelConfig, ModelDescription, Objective, Prediction
from rmoe_megatron.config.requirements import require, require_divides

GATE_INPUTS = ("tokens", "conditioning")
SD3_ENCODERS = ("clip_l", "clip_g", "t5")
SECTIONS = ("model", "recurrence", "lora", "diffusion", "encoders")


def check_model(config: ModelDescription) -> None:
    """Check the model, what is added to it, and its objective.

    Raises:
        UserError: names the key, the value and what is allowed.
    """
    model, recurrence = config.model, config.recurrence
    for section in SECTIONS:
        if getattr(config, section) is not None:
            check_bounds(getattr(config, section), f"{section}.")
    require_divides(model.patch_size, "model.patch_size", model.sample_size, "model.sample_size")
    require_divides(
        model.num_attention_heads, "model.num_attention_heads", model.hidden_size, "model.hidden_size"
    )
    head_size = model.hidden_size // model.num_attention_heads
    require(
        head_size % 2 == 0, f"model.hidden_size / model.num_attention_heads must be even, it is {head_size}."
    )
    # Sines and cosines of two axes share the positional embedding.
    require(
        model.hidden_size % 4 == 0, f"model.hidden_size must be a multiple of 4, it is {model.hidden_size}."
    )
    if model.architecture is Architecture.mmdit:
        _check_mmdit(model)
    else:
        _check_dit(model)
    _check_objective(config)
    check_blocks("model.dual_attention_layers", model.dual_attention_layers, model, may_be_empty=True)
    if config.lora is not None:
        check_blocks("lora.layers", config.lora.layers, model)
        _check_rank("lora.rank", config.lora.rank, model)
        require(recurrence is None, "lora and recurrence exclude each other; set one of them to null.")
    if recurrence is None:
        return
    check_blocks("recurrence.layers", recurrence.layers, model)
    if recurrence.rank is not None:
        _check_rank("recurrence.rank", recurrence.rank, model)
    inputs = recurrence.gate_inputs
    require(
        len(inputs) > 0 and set(inputs) <= set(GATE_INPUTS),
        f"recurrence.gate_inputs {inputs} must be one or both of {', '.join(GATE_INPUTS)}.",
    )


def _check_rank(name: str, rank: int, model: ModelConfig) -> None:
    require(
        rank <= model.hidden_size,
        f"{name} ({rank}) exceeds model.hidden_size ({model.hidden_size}), where a product of two factors has no use "
        "for it; choose a smaller rank.",
    )


def _check_mmdit(model: ModelConfig) -> None:
    for name in ("text_length", "text_hidden_size", "pooled_size", "pos_embed_max_size"):
        value = getattr(model, name)
        require(value > 0, f"model.{name} must be greater than 0 for an MM-DiT, it is {value}.")
    for name in ("num_classes", "learned_sigma"):
        value = getattr(model, name)
        require(not value, f"model.{name} is {value}, but an MM-DiT has none; set architecture=dit.")
    for name in ("mlp_norm_eps", "downscale_freq_shift"):
        value = getattr(model, name)
        require(
            value == getattr(ModelConfig, name),
            f"model.{name} is {value}, but an MM-DiT has it fixed; leave it out.",
        )
    patches = model.sample_size // model.patch_size
    require(
        model.pos_embed_max_size >= patches,
        f"model.pos_embed_max_size ({model.pos_embed_max_size}) must be at least sample_size / patch_size ({patches}).",
    )


def _check_dit(model: ModelConfig) -> None:
    require(
        model.num_classes > 0,
        f"model.num_classes must be greater than 0 for a DiT, it is {model.num_classes}.",
    )
    require(
        model.downscale_freq_shift in (0, 1),
        f"model.downscale_freq_shift must be 1 (diffusers' DiT) or 0 (the original), it is {model.downscale_freq_shift}.",
    )
    for name in (
        "text_length",
        "text_hidden_size",
        "pooled_size",
        "pos_embed_max_size",
        "dual_attention_layers",
        "qk_norm",
    ):
        value = getattr(model, name)
        require(not value, f"model.{name} is {value}, but a DiT has none; leave it out (qk_norm: false).")


def _check_objective(config: ModelDescription) -> None:
    diffusion, is_ddpm = config.diffusion, config.diffusion.objective is Objective.ddpm
    require(
        is_ddpm or not config.model.learned_sigma,
        "model.learned_sigma needs diffusion.objective=ddpm; rectified flow has no variance to learn.",
    )
    require(
        not is_ddpm or diffusion.prediction is Prediction.velocity,
        "diffusion.prediction=sample needs diffusion.objective=rectified_flow; DDPM predicts the noise.",
    )
    require(
        diffusion.prediction is Prediction.velocity or config.model.architecture is Architecture.mmdit,
        "diffusion.prediction=sample is for MM-DiTs; a DiT predicts velocity or noise.",
    )
    require(
        is_ddpm or diffusion.min_snr_gamma is None,
        "diffusion.min_snr_gamma needs diffusion.objective=ddpm; rectified flow weights by its timestep_density.",
    )
    unknown = sorted(set(config.encoders.dropped) - set(SD3_ENCODERS))
    require(not unknown, f"encoders.dropped {unknown} must be among {', '.join(SD3_ENCODERS)}.")
    require(
        not config.encoders.dropped or config.encoders.text_encoder != "minilm",
        f"encoders.dropped {config.encoders.dropped} is for Stable Diffusion 3's text encoders, but encoders.text_encoder "
        "is minilm; set encoders.dropped=[].",
    )


def check_blocks(name: str, layers: list[int], model: ModelConfig, may_be_empty: bool = False) -> None:
    require(
        may_be_empty or len(layers) > 0,
        f"{name} is empty; name at least one block or set {name.partition('.')[0]}=null.",
    )
    require(len(set(layers)) == len(layers), f"{name} {layers} names a block twice.")
    for layer in layers:
        require(
            0 <= layer < model.num_layers,
            f"{name} names block {layer}, but blocks are numbered 0 to {model.num_layers - 1}.",
        )
