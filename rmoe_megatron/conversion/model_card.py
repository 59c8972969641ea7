"""The page that an export carries, README.md: what the model is, of whom it is, how it was trained, resolved, and how to sample it."""

import json
import logging
import shutil
from pathlib import Path

import torch
from diffusers import ModelMixin

from rmoe_megatron.checkpoint.weights import RunWeights
from rmoe_megatron.config.model import Objective
from rmoe_megatron.config.run import RunConfig, Trainable
from rmoe_megatron.conversion.origin import Origin
from rmoe_megatron.conversion.original_limits import beyond_original
from rmoe_megatron.errors import UserError
from rmoe_megatron.files.untrusted import read_json
from rmoe_megatron.pretrained.config_files import AUTOENCODERS, OBJECT, read_config
from rmoe_megatron.pretrained.model_files import MODEL_INDEX
from rmoe_megatron.training.curves import read_records
from rmoe_megatron.versions import versions_of

logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "megatron-core", "diffusers", "transformers")
GRID = "samples.png"


def model_card(
    weights: RunWeights,
    config: RunConfig,
    averaged: bool,
    dtype: torch.dtype,
    transformer: ModelMixin,
    folder: Path,
    origin: Origin,
    remote_code: bool,
) -> str:
    """Return the page of a pipeline as Markdown, and put the run's sample grid beside it.

    Args:
        config: the run's configuration, with the size that images are made in.
        averaged: the weights are moving averages.
        dtype: the data type of the weights.
        folder: with the other parts of the pipeline.
        remote_code: the folder carries the code of classes that diffusers lacks.
    """
    model, diffusion = config.model, config.diffusion
    index = read_json(folder / MODEL_INDEX, OBJECT)
    autoencoder = read_config(folder / "vae" / "config.json", AUTOENCODERS)
    side = model.sample_size * 2 ** (len(autoencoder["block_out_channels"]) - 1)
    rows = {
        "transformer": f"`{type(transformer).__name__}`, {sum(each.numel() for each in transformer.parameters()):,} parameters",
        "pipeline": f"`{index['_class_name']}`",
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
    rows["objective"] = diffusion.objective.value
    if diffusion.objective is Objective.rectified_flow:
        base = diffusion.shift_base_size
        rows["shift of sigma"] = f"{diffusion.shift:g}" + (
            f" at {base} x {base} latents, by size" if base else ""
        )
        rows["prediction"] = diffusion.prediction.value
    rows |= _training_rows(weights, config, averaged, dtype, origin)
    is_ours = any("rmoe_megatron" in str(value) for value in index.values())
    kind = "unconditional-image-generation" if model.is_class_conditional else "text-to-image"
    other = (
        "As one file in the original layout, which ComfyUI reads: `rmoe convert from-hf . RUN`, then `rmoe convert to-single-file RUN "
        "FILE.safetensors`.\n"
        if not model.is_class_conditional and not beyond_original(config)
        else ""
    )
    return (
        _front(kind, origin, "finetune")
        + f"# {_short(config.run_dir)}\n\nExported by `rmoe convert to-hf`.\n\n"
        + _table(rows)
        + _scores(weights, averaged)
        + _samples(weights, config, averaged, folder)
        + "## Use\n\nIn this folder, or with its name in the place of the dot:\n\n"
        + _snippet(config, is_ours, remote_code)
        + f"or, with this package, `rmoe sample . --prompt {json.dumps(_prompt(config))}`.\n\n"
        + other
    )  # fmt: skip


def lora_card(weights: RunWeights, averaged: bool, dtype: torch.dtype, origin: Origin, folder: Path) -> str:
    """Return the page of a file of LoRA as Markdown, and put the run's sample grid beside it."""
    config = weights.config
    source = origin.get("source", "BASE")
    settings = f"num_inference_steps={config.training.sample_steps}, guidance_scale={config.training.sample_guidance:g}"
    return (
        _front("text-to-image", origin, "adapter")
        + f"# {_short(config.run_dir)}\n\nLoRA, exported by `rmoe convert to-lora`.\n\n"
        + _table(_training_rows(weights, config, averaged, dtype, origin))
        + _scores(weights, averaged)
        + _samples(weights, config, averaged, folder)
        + "## Use\n\n`pip install diffusers peft`; in this folder, or with its name in the place of the dot:\n\n```python\n"
        + "from diffusers import StableDiffusion3Pipeline\n\n"
        + f"pipeline = StableDiffusion3Pipeline.from_pretrained({json.dumps(source)})\n"
        + 'pipeline.load_lora_weights(".")\n'
        + f'pipeline({json.dumps(_prompt(config))}, {settings}).images[0].save("picture.png")\n```\n'
    )


def _front(kind: str, origin: Origin, relation: str) -> str:
    """Return what the hub reads of a page; values are JSON, which is YAML."""
    said = {"library_name": "diffusers", "pipeline_tag": kind, **origin.get("licence", {})}
    if origin.get("is_repository"):
        said |= {"base_model": origin["source"], "base_model_relation": relation}
    lines = [f"{key}: {value if value.isidentifier() else json.dumps(value)}" for key, value in said.items()]
    return "\n".join(["---", *lines, "---", ""])


def _table(rows: dict[str, str]) -> str:
    lines = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"| | |\n|---|---|\n{lines}\n\n"


def _training_rows(
    weights: RunWeights, config: RunConfig, averaged: bool, dtype: torch.dtype, origin: Origin
) -> dict[str, str]:
    """Return base and licence, data, and what was trained how."""
    training, optimizer = config.training, config.optimizer
    rows = {
        "weights": f"{'moving averages' if averaged else 'those of the step'}, {_name(dtype)}",
        "training": f"{weights.checkpoint.step} steps of {training.global_batch_size} samples, precision {config.precision.value}, "
        f"seed {config.seed}",
    }
    if config.fine_tuning is not None:
        rows["base"] = f"`{origin.get('source') or _short(config.fine_tuning.base)}`"
    elif "source" in origin:
        rows["imported from"] = f"`{origin['source']}`"
    if config.fine_tuning is not None or "source" in origin:
        licence = origin.get("licence", {})
        rows["licence"] = ", ".join(licence.values()) or "that of the base, which its page says"
    if training.steps:  # an import has learned nothing here
        rows["data"] = ", ".join(f"`{_tail(name)}`" for name in _data_sets(config))
        rows["optimizer"] = (
            f"{optimizer.name.value}, learning rate {optimizer.learning_rate:g} ({optimizer.lr_decay_style.value}, "
            f"{optimizer.warmup_steps} steps of warm-up), weight decay {optimizer.weight_decay:g}, average {optimizer.ema_decay:g}"
        )
    if config.fine_tuning is not None:
        blocks = f" {', '.join(map(str, config.fine_tuning.blocks))}" if config.fine_tuning.blocks else ""
        what = {Trainable.added: "what was added", Trainable.all: "everything"}
        rows["trained"] = what.get(config.fine_tuning.trainable, f"blocks{blocks}")
    if config.recurrence is not None:
        each = config.recurrence
        rows["recurrence"] = (
            f"{each.num_modules} modules, {each.steps} steps, blocks {', '.join(map(str, each.layers))}"
        )
    if config.lora is not None:
        rows["LoRA"] = f"rank {config.lora.rank}, blocks {', '.join(map(str, config.lora.layers))}"
    if config.loop is not None:
        rows["loop"] = f"blocks {config.loop.first} to {config.loop.last}, {config.loop.times} times"
    rows["libraries"] = ", ".join(f"{name} {number}" for name, number in versions_of(*LIBRARIES).items())
    return rows


def _data_sets(config: RunConfig) -> list[str]:
    data = config.data
    return [data.train] if data.train else [dataset.path for dataset in data.mixture]


def _scores(weights: RunWeights, averaged: bool) -> str:
    """Return the newest validation losses and benchmark scores of the run up to the step; they are of averaged weights."""
    metrics = weights.checkpoint.path.parents[1] / "metrics.jsonl"
    if not averaged or not metrics.is_file():
        return ""
    names = tuple(f"{each.name}_" for each in weights.config.training.evaluations)
    newest: dict[str, tuple[int, float]] = {}
    try:
        records = read_records(metrics)
    except UserError as error:
        logger.warning("The page of the export has no scores: %s", error)
        return ""
    for step, record in records:
        for name, value in record.items():
            is_score = name == "validation_loss" or (names and name.startswith(names))
            if is_score and value is not None and step <= weights.checkpoint.step:
                newest[name] = (step, value)
    lines = [f"| {name} | {value:.4g} | {step} |" for name, (step, value) in sorted(newest.items())]
    return "\n".join(["| score | value | step |", "|---|---|---|", *lines, "\n"]) if lines else ""


def _samples(weights: RunWeights, config: RunConfig, averaged: bool, folder: Path) -> str:
    """Copy the newest sample grid up to the step, and return its place in the page; it was drawn with averaged weights."""
    grids = sorted((weights.checkpoint.path.parents[1] / "samples").glob("step-????????.png"))
    grids = [
        grid for grid in grids if grid.stem[5:].isdigit() and int(grid.stem[5:]) <= weights.checkpoint.step
    ]
    if not averaged or not grids:
        return ""
    shutil.copyfile(grids[-1], folder / GRID)
    prompts = "; ".join(config.training.sample_prompts)
    return f"![Samples of step {int(grids[-1].stem[5:])}]({GRID})\n\n*Step {int(grids[-1].stem[5:])}: {prompts}. Not picked.*\n\n"


def _snippet(config: RunConfig, is_ours: bool, remote_code: bool) -> str:
    """Return Python that draws a picture."""
    imports = ["from diffusers import DiffusionPipeline"]
    if is_ours and not remote_code:
        imports += ["", "import rmoe_megatron.hf  # for classes that diffusers lacks"]
    trust = ", trust_remote_code=True" if is_ours and remote_code else ""
    prompt = f"[{_prompt(config)}]" if config.model.is_class_conditional else json.dumps(_prompt(config))
    settings = f"num_inference_steps={config.training.sample_steps}, guidance_scale={config.training.sample_guidance:g}"
    lines = [
        *imports, "", f'pipeline = DiffusionPipeline.from_pretrained("."{trust})',
        f'pipeline({prompt}, {settings}).images[0].save("picture.png")',
    ]  # fmt: skip
    return "```python\n" + "\n".join(lines) + "\n```\n\n"


def _prompt(config: RunConfig) -> str:
    """Return the run's first prompt, or class."""
    default = "0" if config.model.is_class_conditional else "a red circle"
    return next(iter(config.training.sample_prompts), default)


def _short(name: str) -> str:
    """Return the name of an encoder or a run without the place where it lies on some machine."""
    return Path(name).name if Path(name).is_absolute() else name


def _tail(name: str) -> str:
    """Return the end of a data set's folder or URL."""
    return "/".join(name.rstrip("/").split("/")[-2:])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
