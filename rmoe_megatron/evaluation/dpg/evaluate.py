"""DPG-Bench from prompts to scores: four images a prompt, asked by all ranks, summed up by rank 0."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import TypeAdapter

from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.dpg.answering import load_answerer
from rmoe_megatron.evaluation.dpg.questions import NUM_PROMPTS, Item
from rmoe_megatron.evaluation.dpg.scoring import QUIRKS, score
from rmoe_megatron.evaluation.generation import (
    ImageRequest,
    Progress,
    Sampling,
    fill,
    generate,
    is_folder_of_images,
    require_same,
)
from rmoe_megatron.evaluation.protocol import Protocol
from rmoe_megatron.evaluation.results import Example, markdown_table, write_results
from rmoe_megatron.launch import local_rank, rank
from rmoe_megatron.pictures import open_picture, png
from rmoe_megatron.platform import inference_device
from rmoe_megatron.typed_files import read_json

ANSWERS = TypeAdapter(list[dict[str, str]])
EXAMPLES = 12


@dataclass(frozen=True)
class Settings:
    """What is asked by which model and rules. ``images_per_prompt`` is 4, in a grid of two by two, or 1."""

    out: Path
    images_per_prompt: int = 4
    protocol: Protocol = Protocol.official
    answerer: str = "mplug"


def evaluate_dpg(
    items: list[Item], sampling: Sampling, settings: Settings, progress: Callable[[str], Progress | None]
) -> None:
    """Make the images (``ITEM.png``, grids), unless the model is a folder of them, ask and write the results.

    Every rank takes part. What is there is not done again.

    Raises:
        UserError: images are missing, or a model cannot be had.
    """
    model, out = Path(sampling.model), settings.out
    if is_folder_of_images(model):
        require_same(out, {"model": str(model.absolute())})
        files = [model / f"{item.name}.png" for item in items]
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise UserError(
                f"{model} lacks {len(missing)} of {len(files)} images, {missing[0].name} the first."
            )
    else:
        require_same(out, sampling.described() | {"images_per_prompt": settings.images_per_prompt})
        files = _make_grids(items, sampling, settings, progress)
    answers = ask_all(items, files, settings, progress("ask"))
    if rank() == 0:
        results = {
            "benchmark": "DPG-Bench",
            "protocol": settings.protocol.value,
            "quirks": QUIRKS if settings.protocol is Protocol.official else [],
            "differences": [
                *(
                    []
                    if settings.answerer == "mplug"
                    else [f"asked of {settings.answerer}, not of mPLUG: not comparable"]
                ),
                *([] if len(items) == NUM_PROMPTS else [f"not the published {NUM_PROMPTS} prompts"]),
                *([] if settings.images_per_prompt == 4 else ["not four images a prompt"]),
            ],
            "sampling": sampling.described(),
            **score(items, answers, settings.protocol),
        }
        examples = [Example("prompts", file, item.prompt) for item, file in zip(items, files, strict=True)][
            :EXAMPLES
        ]
        write_results(out, results, table(results), examples)


def _make_grids(
    items: list[Item], sampling: Sampling, settings: Settings, progress: Callable[[str], Progress | None]
) -> list[Path]:
    """Make the images one by one, then put those of a prompt into the published layout."""
    number = settings.images_per_prompt
    requests = [
        ImageRequest(item.prompt, index, image, settings.out / "tiles" / item.name / f"{image}.png")
        for index, item in enumerate(items)
        for image in range(number)
    ]
    generate(requests, sampling, settings.out / "claims" / "images", progress("sample"))
    files = [settings.out / "images" / f"{item.name}.png" for item in items]

    def whole(index: int) -> bytes:
        tiles_of = requests[index * number : (index + 1) * number]
        return png(grid([open_picture(request.path).convert("RGB") for request in tiles_of]))

    fill(files, settings.out / "claims" / "grids", whole)
    return files


def grid(images: list[Image.Image]) -> Image.Image:
    """Put four images into a grid of two by two, or take one as it is."""
    if len(images) == 1:
        return images[0]
    width, height = images[0].size
    whole = Image.new("RGB", (2 * width, 2 * height))
    for place, image in enumerate(images):
        whole.paste(image, (place % 2 * width, place // 2 * height))
    return whole


def tiles(image: Image.Image, number: int) -> list[Image.Image]:
    """Cut a grid of two by two into its images, or take one image as it is."""
    if number == 1:
        return [image]
    width, height = image.width // 2, image.height // 2
    places = [(place % 2 * width, place // 2 * height) for place in range(4)]
    return [image.crop((left, top, left + width, top + height)) for left, top in places]


def ask_all(
    items: list[Item], files: list[Path], settings: Settings, progress: Progress | None
) -> list[list[dict[int, str]]]:
    """Ask about the images of every prompt that is not answered yet; returns all answers, of all ranks."""
    answered = [settings.out / "answers" / f"{item.name}.{settings.protocol.value}.json" for item in items]
    answerer = functools.cache(lambda: load_answerer(settings.answerer, _device()))

    def answers(number: int) -> bytes:
        with open_picture(files[number]) as image:
            of_images = [
                {
                    key: answerer().answer(tile, each.question)
                    for key, each in items[number].propositions.items()
                }
                for tile in tiles(image.convert("RGB"), settings.images_per_prompt)
            ]
        return json.dumps(of_images).encode()

    fill(answered, settings.out / "claims" / "answers", answers, progress)
    return [
        [{int(key): answer for key, answer in of_image.items()} for of_image in read_json(file, ANSWERS)]
        for file in answered
    ]


def _device() -> str:
    return str(inference_device(local_rank()))


def table(results: dict[str, Any]) -> str:
    """Return the scores as Markdown tables, with what they differ in from published ones."""
    header = ["DPG-Bench", "overall", *results["categories_l1"]]
    overall = "-" if results["overall"] is None else f"{results['overall']:.2f}"
    row = [results["protocol"], overall, *(f"{value:.2f}" for value in results["categories_l1"].values())]
    notes = "".join(f"- {note}\n" for note in results["differences"])
    return f"{markdown_table(header, [row])}\n{notes}"
