"""Pictures and figures of what the gates of a trained model decide while it samples: ``rmoe diagnose routing``."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from rmoe_megatron.conversion.export import export_run
from rmoe_megatron.distributed.launch import require_one_rank
from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic
from rmoe_megatron.files.images import embedded
from rmoe_megatron.inference.sampling import open_pipeline, sample_images, set_depth
from rmoe_megatron.inspection.routing_figures import numbers
from rmoe_megatron.inspection.routing_pictures import (
    draw_attention,
    draw_maps,
    draw_trajectories,
    draw_usage,
    draw_words,
)
from rmoe_megatron.inspection.routing_watch import Routing, watching
from rmoe_megatron.pretrained.model_files import MODEL_INDEX
from rmoe_megatron.training.logging import json_text

STYLE = "body { font-family: sans-serif; margin: 2em; max-width: 90em } img { max-width: 100% } td, th { padding: 0.2em 0.8em; text-align: right }"
CAPTIONS = {
    "maps": "Which module painted which patch: the one that was picked most often over all sampling steps, for the first picture of each "
    "of the first prompts.",
    "usage": "The share of tokens that each module gets, over the timesteps of sampling.",
    "words": "Words and modules: a module's share in prompts with the word, less its share in prompts without it.",
    "trajectories": "Where the states of sampled tokens move from latent step to latent step, in the two directions of their largest "
    "variance, at the first, the middle and the last sampling step.",
    "attention": "Which part of the vision tokens' attention goes to the text, and how much of it moves between latent steps (0: none, 1: all).",
}
COLUMNS = {
    "entropy": "entropy", "switch_rate": "switches", "agreement_between_seeds": "same module in two pictures of a prompt",
    "agreement_by_chance": "by chance", "attention_shift": "attention that moves", "text_share": "attention to the text",
}  # fmt: skip


@dataclass(frozen=True)
class RoutingSettings:
    """How the pictures are sampled; ``images`` is their number for each prompt, each with the noise of a seed of its own."""

    prompts: list[str]
    images: int
    steps: int
    guidance: float
    seed: int
    dtype: str
    depth: int | None = None


def diagnose_routing(
    model: Path,
    out: Path,
    settings: RoutingSettings,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, object]]:
    """Sample pictures and write what the gates decided; returns the figures of ``routing.json``.

    ``out`` gets ``routing.json``, a PNG for each of ``CAPTIONS``, and ``index.html`` with all of it. Decisions are those of the half of each
    batch that sees the prompt.

    Args:
        model: the folder of a run, whose averaged weights are taken, or an exported one.
        progress: called with the pictures done and the number of all.

    Raises:
        UserError: the model has no gate that chooses, there are two prompts that are the same, ``out`` cannot be written, or this is one
            of several ranks.
    """
    require_one_rank("rmoe diagnose routing")
    atomic.check_writable(out, "--out")
    if len(set(settings.prompts)) < len(settings.prompts):
        raise UserError(
            "A prompt is given twice; give each once, and --images-per-prompt for several pictures of it."
        )
    with exported(model) as folder:
        pipeline = open_pipeline(folder, settings.dtype)
        recurrence = getattr(pipeline.transformer.config, "recurrence", None)
        if recurrence is None or recurrence["num_modules"] < 2:
            raise UserError(
                f"{model} has no gate that chooses between modules; diagnose a model with a recurrence of two or more."
            )
        if settings.depth is not None:
            set_depth(pipeline, settings.depth)
        routings, images = _sample(pipeline, settings, progress)
    found = numbers(routings, recurrence["num_modules"])
    pictures = {
        "maps": draw_maps(routings, images, recurrence["num_modules"]),
        "usage": draw_usage(routings, recurrence["num_modules"]),
        "words": draw_words(routings, recurrence["num_modules"]),
        "trajectories": draw_trajectories(routings, recurrence["num_modules"]),
        "attention": draw_attention(routings),
    }
    described = {
        "model": str(model), "steps": settings.steps, "guidance": settings.guidance, "seed": settings.seed, "dtype": settings.dtype,
        "images_per_prompt": settings.images, "prompts": settings.prompts, "recurrence": dict(recurrence),
        "timesteps": next(iter(routings.values())).timesteps, "places": found,
    }  # fmt: skip
    with atomic.filling(out):
        for name, picture in pictures.items():
            atomic.write(out / f"{name}.png", picture)
        atomic.write(out / "routing.json", json_text(described, indent=1) + "\n")
        atomic.write(out / "index.html", page(model, settings, found, pictures))
    return found


@contextmanager
def exported(model: Path) -> Iterator[Path]:
    """Give the folder of a diffusers pipeline: the model itself, or the export of a run for as long as it is needed."""
    if (model / MODEL_INDEX).exists():
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="rmoe-routing-") as folder:
        export_run(model, Path(folder) / "model")
        yield Path(folder) / "model"


def _sample(
    pipeline: Any, settings: RoutingSettings, progress: Callable[[int, int], None]
) -> tuple[dict[str, Routing], dict[str, np.ndarray]]:
    routings, images = {}, {}
    total = len(settings.prompts) * settings.images
    progress(0, total)
    for number, prompt in enumerate(settings.prompts):
        seeds = [settings.seed + image for image in range(settings.images)]
        with watching(pipeline, settings.images, settings.steps) as routing:
            images[prompt] = sample_images(
                pipeline,
                [prompt] * settings.images,
                seeds,
                settings.steps,
                settings.guidance,
                settings.images,
            )
        routings[prompt] = routing
        progress((number + 1) * settings.images, total)
    return routings, images


def page(
    model: Path,
    settings: RoutingSettings,
    found: Sequence[Mapping[str, object]],
    pictures: Mapping[str, bytes],
) -> str:
    """Return one HTML page with the figures and the pictures, which loads nothing from elsewhere."""
    title = f"What the gates of {model} decide"
    drawn = f"{len(settings.prompts)} prompts, {settings.images} pictures of each, {settings.steps} sampling steps, guidance {settings.guidance:g}"
    columns = {name: label for name, label in COLUMNS.items() if any(name in each for each in found)}
    head = "".join(
        f"<th>{escape(label)}"
        for label in ("block", "pass", "latent step", "shares of the modules", *columns.values())
    )
    rows = []
    for each in found:
        usage: Any = each["usage"]
        shares = " ".join(f"{share:.2f}" for share in usage)
        values = [f"{each[name]:.3f}" if name in each else "" for name in columns]
        cells = (each["block"], each["pass"], each["latent_step"], shares, *values)
        rows.append("<tr>" + "".join(f"<td>{cell}" for cell in cells))
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{escape(title)}</h1><p>{escape(drawn)}.</p><table><tr>{head}{''.join(rows)}</table>",
        *(
            f"<h2>{escape(CAPTIONS[name])}</h2><img src='{embedded(picture)}' alt='{name}'>"
            for name, picture in pictures.items()
        ),
        "</html>",
    ]
    return "\n".join(parts) + "\n"
