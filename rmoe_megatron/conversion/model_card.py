"""The page that an exported folder carries, README.md: what the model is and how it was trained, resolved, and how to sample it."""

from pathlib import Path

import torch
from diffusers import ModelMixin

from rmoe_megatron.config.model import Objective
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.files.untrusted import read_json
from rmoe_megatron.pretrained.config_files import AUTOENCODERS, OBJECT, read_config
from rmoe_megatron.pretrained.model_files import MODEL_INDEX
from rmoe_megatron.versions import versions_of

LIBRARIES = ("torch", "megatron-core", "diffusers", "transformers")


def model_card(
    config: RunConfig,
    step: int,
    averaged: bool,
    dtype: torch.dtype,
    transformer: ModelMixin,
    folder: Path,
) -> str:
    """Return the page as Markdown.

    Args:
        config: the run's configuration, with the size that images are made in.
        step: optimizer steps of the exported checkpoint.
        averaged: the weights are moving averages.
        dtype: the data type of the weights.
        folder: with the other parts of the pipeline.
    """
    model, diffusion = config.model, config.diffusion
    pipeline_class = read_json(folder / MODEL_INDEX, OBJECT)["_class_name"]
    autoencoder = read_config(folder / "vae" / "config.json", AUTOENCODERS)
    side = model.sample_size * 2 ** (len(autoencoder["block_out_channels"]) - 1)
    rows = {
        "transformer": f"`{type(transformer).__name__}`, {sum(each.numel() for each in transformer.parameters()):,} parameters",
        "pipeline": f"`{pipeline_class}`",
        "weights": f"{'moving averages' if averaged else 'those of the step'}, {_name(dtype)}",
        "training": f"{step} steps, precision {config.precision.value}, seed {config.seed}",
        "objective": diffusion.objective.value,
        "images": f"{side} x {side} pixels, latents {model.sample_size} x {model.sample_size} x {model.in_channels}",
        "autoencoder": f"`{_short(config.encoders.autoencoder)}`",
    }
    if model.is_class_conditional:
        rows["classes"] = str(model.num_classes)
    else:
        dropped = f", without {', '.join(config.encoders.dropped)}" if config.encoders.dropped else ""
        rows["text encoder"] = (
            f"`{_short(config.encoders.text_encoder)}`{dropped}, {model.text_length} tokens"
        )
    if diffusion.objective is Objective.rectified_flow:
        base = diffusion.shift_base_size
        rows["shift of sigma"] = f"{diffusion.shift:g}" + (
            f" at {base} x {base} latents, by size" if base else ""
        )
        rows["prediction"] = diffusion.prediction.value
    if config.recurrence is not None:
        each = config.recurrence
        rows["recurrence"] = (
            f"{each.num_modules} modules, {each.steps} steps, blocks {', '.join(map(str, each.layers))}"
        )
    if config.loop is not None:
        rows["loop"] = f"blocks {config.loop.first} to {config.loop.last}, {config.loop.times} times"
    rows["libraries"] = ", ".join(f"{name} {number}" for name, number in versions_of(*LIBRARIES).items())
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    kind = "unconditional-image-generation" if model.is_class_conditional else "text-to-image"
    prompt = "0" if model.is_class_conditional else '"a red circle"'
    return (
        f"---\nlibrary_name: diffusers\npipeline_tag: {kind}\n---\n# {_short(config.run_dir)}\n\n"
        f"Exported by `rmoe convert to-hf`.\n\n| | |\n|---|---|\n{table}\n\n"
        f"```bash\nrmoe sample . --prompt {prompt}\n```\n\n"
        "```python\nfrom diffusers import DiffusionPipeline\n\nimport rmoe_megatron.hf  # for classes that diffusers lacks\n\n"
        'pipeline = DiffusionPipeline.from_pretrained(".")\n```\n'
    )


def _short(name: str) -> str:
    """Return the name of an encoder or a run without the place where it lies on some machine."""
    return Path(name).name if Path(name).is_absolute() else name


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
