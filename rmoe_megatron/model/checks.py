"""Checks of what a model is: the transformer, what is added to it, its objective and its encoders."""

from rmoe_megatron.config.bounds import check_bounds
from rmoe_megatron.config.model import DepthLoss, ModelConfig, ModelDescription, Objective, Prediction
from rmoe_megatron.config.require import require, require_blocks, require_divides
from rmoe_megatron.errors import UserError
from rmoe_megatron.model.registry import adapters_of, family_of

SD3_ENCODERS = ("clip_l", "clip_g", "t5")
MAX_POSITION_VALUES = 1 << 28  # SD3.5-medium's are 384 x 384 x 1536
SECTIONS = ("model", "recurrence", "lora", "loop", "diffusion", "encoders")


def check_model(description: ModelDescription) -> None:
    """Check a model; Megatron-Core is not imported.

    Raises:
        UserError: names the key, the value and what is allowed.
    """
    model = description.model
    for name in SECTIONS:
        section = getattr(description, name)
        if section is not None:
            check_bounds(section, f"{name}.")
    _check_sizes(model)
    family_of(description).check(description)
    _check_objective(description)
    _check_depth(description)
    _check_encoders(description)
    require_blocks(
        "model.dual_attention_layers", model.dual_attention_layers, model.num_layers, may_be_empty=True
    )
    adapters = list(adapters_of(description))
    for adapter, section in adapters:
        require_blocks(f"{adapter.name}.layers", section.layers, model.num_layers)
        adapter.check(model, section)
    require(
        len(adapters) < 2,
        f"{' and '.join(sorted(adapter.name for adapter, _ in adapters))} exclude each other; set one of them to null.",
    )


def check_described_model(description: ModelDescription, where: str) -> None:
    """Check a model that a file describes, before anything of it is built.

    Raises:
        UserError: names ``where`` it is described, and what is wrong.
    """
    model = description.model
    try:
        check_model(description)
    except UserError as error:
        raise UserError(f"{where} describes no model: {error}") from error
    # Models compute their positions when they are built.
    side = max(model.sample_size // model.patch_size, model.pos_embed_max_size)
    if side**2 * model.hidden_size > MAX_POSITION_VALUES:
        raise UserError(
            f"{where} describes {side} x {side} positions of width {model.hidden_size}, "
            "more than any model has."
        )


def _check_sizes(model: ModelConfig) -> None:
    hidden, heads = model.hidden_size, model.num_attention_heads
    require_divides(model.patch_size, "model.patch_size", model.sample_size, "model.sample_size")
    require_divides(heads, "model.num_attention_heads", hidden, "model.hidden_size")
    require(
        hidden // heads % 2 == 0,
        f"model.hidden_size / model.num_attention_heads must be even, it is {hidden // heads}.",
    )
    # Sines and cosines of two axes share the positional embedding.
    require(hidden % 4 == 0, f"model.hidden_size must be a multiple of 4, it is {hidden}.")


def _check_objective(description: ModelDescription) -> None:
    diffusion, is_ddpm = description.diffusion, description.diffusion.objective is Objective.ddpm
    require(
        is_ddpm or not description.model.learned_sigma,
        "model.learned_sigma needs diffusion.objective=ddpm; rectified flow has no variance to learn.",
    )
    require(
        not is_ddpm or diffusion.prediction is Prediction.velocity,
        "diffusion.prediction=sample needs diffusion.objective=rectified_flow; DDPM predicts the noise.",
    )
    require(
        is_ddpm or diffusion.min_snr_gamma is None,
        "diffusion.min_snr_gamma needs diffusion.objective=ddpm; rectified flow weights by its timestep_density.",
    )


def _check_depth(description: ModelDescription) -> None:
    loop, model, depth_loss = description.loop, description.model, description.diffusion.depth_loss
    require(
        (loop is None and depth_loss is DepthLoss.last) or not model.is_class_conditional,
        "loop and diffusion.depth_loss are for MM-DiTs; leave them out for a DiT.",
    )
    require(
        loop is None or loop.first <= loop.last < model.num_layers - 1,
        "loop.first and loop.last must be blocks in this order, and the last block, where the text ends, cannot be looped"
        + (f": {loop.first} to {loop.last} of 0 to {model.num_layers - 1}." if loop is not None else ""),
    )
    require(
        depth_loss is DepthLoss.last or loop is not None or description.recurrence is not None,
        f"diffusion.depth_loss={depth_loss.value} needs loop or recurrence, whose depths it decodes; set it to last.",
    )
    require(
        depth_loss is not DepthLoss.drawn or (loop is not None and loop.times > 1),
        "diffusion.depth_loss=drawn needs a loop of two times or more; for latent steps take every.",
    )


def _check_encoders(description: ModelDescription) -> None:
    encoders = description.encoders
    unknown = sorted(set(encoders.dropped) - set(SD3_ENCODERS))
    require(not unknown, f"encoders.dropped {unknown} must be among {', '.join(SD3_ENCODERS)}.")
    require(
        not encoders.dropped or encoders.text_encoder != "minilm",
        f"encoders.dropped {encoders.dropped} is for Stable Diffusion 3's text encoders, but encoders.text_encoder "
        "is minilm; set encoders.dropped=[].",
    )
