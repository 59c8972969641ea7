"""What the layouts that models were published in have no place for."""

from rmoe_megatron.config.model import Architecture, ModelDescription, Objective
from rmoe_megatron.conversion.facebook_dit import HEADS
from rmoe_megatron.conversion.sd3_file import HEAD_SIZE
from rmoe_megatron.pretrained.architecture import beyond_diffusers

ORIGINAL_DIT = {"downscale_freq_shift": 0.0, "mlp_norm_eps": 1e-6}  # which the original code has fixed


def beyond_original(config: ModelDescription) -> list[str]:
    """Return what of a model a file in the original layout cannot express: names of settings with their values."""
    model, head = config.model, config.model.hidden_size // config.model.num_attention_heads
    found = [each for each in beyond_diffusers(config) if "downscale_freq_shift" not in each]
    if model.architecture is Architecture.mmdit:
        if not model.qk_norm and head != HEAD_SIZE:
            found.append(f"heads of width {head} without model.qk_norm (only {HEAD_SIZE})")
        return found
    for name, value in ORIGINAL_DIT.items():
        if getattr(model, name) != value:
            found.append(f"model.{name}={getattr(model, name):g} (only {value:g})")
    if not model.shared_conditioning:
        found.append("timestep and label embeddings of every block's own")
    if config.diffusion.objective is not Objective.ddpm:
        found.append(f"diffusion.objective={config.diffusion.objective.value}")
    if HEADS.get(model.hidden_size, model.num_attention_heads) != model.num_attention_heads:
        found.append(f"model.num_attention_heads={model.num_attention_heads}")
    return found
