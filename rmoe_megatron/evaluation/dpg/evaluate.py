"""DPG-Bench from prompts to scores: four images a prompt, asked by all ranks, summed up by rank 0."""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import TypeAdapter

from rmoe_megatron.distributed.device import inference_device
from rmoe_megatron.distributed.launch import local_rank, rank
from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.dpg.answering import MPLUG, YesOrNo, load_answerer
from rmoe_megatron.evaluation.dpg.questions import NUM_PROMPTS, Item
from rmoe_megatron.evaluation.dpg.scoring import QUIRKS, score
from rmoe_megatron.evaluation.early_judge import EarlyJudge
from rmoe_megatron.evaluation.limits import heading, main_score, of_a_part
from rmoe_megatron.evaluation.results import (
    Example,
    markdown_table,
    prompt_key,
    standard_error,
    with_error,
    write_results,
)
from rmoe_megatron.evaluation.rule_set import RuleSet
from rmoe_megatron.evaluation.workspace import (
    answer_products,
    check_out,
    folder_differences,
    plan,
    products_of,
)
from rmoe_megatron.files.images import open_picture
from rmoe_megatron.files.untrusted import read_json
from rmoe_megatron.inference.fingerprints import model_digest
from rmoe_megatron.inference.generation import (
    ImageRequest,
    Picture,
    Progress,
    Sampling,
    fill,
    generate,
    image_product,
    sampling_record,
)
from rmoe_megatron.inference.provenance import Product, Record, digest, png_with, read_record
from rmoe_megatron.pretrained.hub import model_folder
from rmoe_megatron.pretrained.model_files import judge_parts
from rmoe_megatron.versions import INFERENCE, versions_of

ANSWERS = TypeAdapter(list[dict[str, str]])
EXAMPLES = 12


@dataclass(frozen=True)
class Settings:
    """What is asked by which model and rules.

    ``images_per_prompt`` is 4, in a grid of two by two, or 1; None is 4, and for a folder of pictures what they say themselves.
    """

    out: Path
    images_per_prompt: int | None = None
    protocol: RuleSet = RuleSet.official
    answerer: str = "mplug"
    is_official: bool = False  # the published table, whole
    again: bool = False  # make anew what was made by another command, which is refused otherwise
    chosen: tuple[int, ...] | None = None  # numbers of the items to be scored; None is all
    allow_incomplete: bool = False  # score what a folder of images has


def evaluate_dpg(
    items: list[Item], sampling: Sampling, settings: Settings, progress: Callable[[str], Progress | None]
) -> None:
    """Make the images (``ITEM.png``, grids), unless the model is a folder of them, ask and write the results.

    Every rank takes part. What is there is not done again.

    Raises:
        UserError: images are missing, or a model is not here and cannot be downloaded.
    """
    out, tile_pictures = settings.out, list[Picture]()
    numbers = settings.chosen or range(len(items))
    if sampling.is_given:
        grids, made = plan(
            lambda folder: _requests(items, numbers, folder), sampling, out, settings.allow_incomplete,
            lambda folder: _requests(items, range(len(items)), folder),
        )  # fmt: skip
        number = images_in_a_file([grid.request.path for grid in grids], sampling, settings.images_per_prompt)
    else:
        made, number = sampling_record(sampling), settings.images_per_prompt or 4
        tile_pictures, grids = _tiles_and_grids(items, numbers, made, out, number)
    everything, items = items, [items[grid.request.prompt_index] for grid in grids]
    answerer_made_of = answerer_record(settings.answerer) | {
        "device": inference_device(local_rank()).type,
        "versions": versions_of(*INFERENCE),
    }
    answers_of = answer_products(
        [out / "answers" / f"{item.name}.{settings.protocol.value}.json" for item in items],
        [asdict(item) for item in items],
        [[grid] for grid in grids],
        {
            "images_per_prompt": number,
            "protocol": settings.protocol.value,
            "judge": answerer_made_of,
        },
    )
    identity: Record = {
        "benchmark": "DPG-Bench",
        "protocol": settings.protocol.value,
        "images_per_prompt": number,
        "prompt_set": {
            "number": len(numbers),
            "sha256": digest([asdict(everything[number]) for number in numbers]),
        },
        "sampling": made,
        "judge": answerer_made_of,
    }
    products = [*products_of(tile_pictures), *products_of(grids), *answers_of]
    check_out(out, products, identity, settings.again)
    answerer = EarlyJudge(
        lambda: load_answerer(settings.answerer, _device()),
        is_needed=not all(product.is_made for product in answers_of),
    )
    if not sampling.is_given:
        generate([(sampling, tile_pictures)], out / "claims" / "images", progress("sample"))
        _put_together(tile_pictures, products_of(grids), out / "claims" / "grids")
    files = [picture.request.path for picture in grids]
    answers = ask_all(items, files, number, answers_of, settings, answerer, progress("ask"))
    if rank() == 0:
        prompt_scores = _prompt_scores(grids, items, answers, settings.protocol)
        found = score(items, answers, settings.protocol)
        overall = {"overall": found.pop("overall"), "standard_error": standard_error(prompt_scores)}
        results = identity | {
            "model": str(Path(sampling.model).absolute()),
            "answerer": settings.answerer,
            "quirks": QUIRKS if settings.protocol is RuleSet.official else [],
            "differences": [
                *(
                    []
                    if settings.answerer == "mplug"
                    else [f"asked of {settings.answerer}, not of mPLUG: not comparable"]
                ),
                *([] if settings.is_official else [f"not the published table of {NUM_PROMPTS} prompts"]),
                *([] if number == 4 else ["not four images a prompt"]),
                *folder_differences(made),
            ],
            "cut": _how_cut(files[0], number),
            **of_a_part(overall, settings.chosen, len(everything)),
            **found,
            "prompt_scores": prompt_scores,
        }
        write_results(out, results, table(results), _examples(grids, prompt_scores["prompts"]))


def _examples(grids: list[Picture], scores: dict[str, float]) -> list[Example]:
    """Return the best and the worst prompts with their scores."""
    requests = {prompt_key(each.request.prompt_index, each.request.prompt): each.request for each in grids}
    order = sorted(scores, key=lambda name: -scores[name])
    chosen = {"best": order[: EXAMPLES // 2], "worst": order[EXAMPLES // 2 :][-EXAMPLES // 2 :]}
    return [
        Example(title, requests[name].path, f"{scores[name]:.1f} {requests[name].prompt}")
        for title, names in chosen.items()
        for name in names
    ]


def images_in_a_file(files: list[Path], sampling: Sampling, asked: int | None) -> int:
    """Return how many images of a prompt a file of a folder holds: as asked for, or as the folder's pictures say.

    Raises:
        UserError: the pictures of a folder say nothing, or something else than is asked for.
    """
    for file in files:
        said = (read_record(file) or {}).get("tiles")
        if said is not None and said != (asked or said):
            raise UserError(f"{file} holds {said} images, not {asked}; leave --images-per-prompt out.")
        asked = asked or said
    if asked is None:
        raise UserError(
            f"The pictures in {sampling.model} do not say what they are; give --images-per-prompt 4 for grids of two by two, or "
            "1 for single images."
        )
    return asked


def _requests(items: list[Item], numbers: Sequence[int], folder: Path) -> list[ImageRequest]:
    return [
        ImageRequest(items[number].prompt, number, 0, folder / f"{items[number].name}.png")
        for number in numbers
    ]


def _tiles_and_grids(
    items: list[Item], numbers: Sequence[int], record: Record, out: Path, number: int
) -> tuple[list[Picture], list[Picture]]:
    """Return the single images, and the files in the published layout that they are put into."""
    requests = [
        ImageRequest(items[index].prompt, index, image, out / "tiles" / items[index].name / f"{image}.png")
        for index in numbers
        for image in range(number)
    ]
    tiles_made = [Picture(request, image_product(request, record)) for request in requests]

    def of_grid(place: int, request: ImageRequest) -> Record:
        of_prompt = tiles_made[place * number : (place + 1) * number]
        parts = {"tiles": number, "images": [picture.identity for picture in of_prompt]}
        return {"prompt": request.prompt, "prompt_number": request.prompt_index} | parts | record

    whole = _requests(items, numbers, out / "images")
    return tiles_made, [
        Picture(request, Product(request.path, functools.partial(of_grid, place, request)))
        for place, request in enumerate(whole)
    ]


def _put_together(tile_pictures: list[Picture], grids: list[Product], claims: Path) -> None:
    """Put the single images of every prompt into a file."""
    number = len(tile_pictures) // len(grids)

    def whole(index: int) -> bytes:
        of_prompt = tile_pictures[index * number : (index + 1) * number]
        images = [open_picture(picture.request.path).convert("RGB") for picture in of_prompt]
        return png_with(grid(images), grids[index].record)

    fill(grids, claims, whole)


def _how_cut(file: Path, number: int) -> str:
    with open_picture(file) as image:
        width, height = image.size
    if number == 1:
        return f"not at all: {width} x {height} pixels are one image"
    return f"{width} x {height} pixels into four tiles of {width // 2} x {height // 2}"


def _prompt_scores(
    grids: list[Picture], items: list[Item], answers: list[list[dict[int, str]]], protocol: RuleSet
) -> dict[str, dict[str, float]]:
    """Return the score of every prompt in percent that is not left out, in one group: the benchmark has no tasks."""
    scores = {}
    for picture, item, of_images in zip(grids, items, answers, strict=True):
        alone = score([item], [of_images], protocol)["overall"]
        if alone is not None:
            scores[prompt_key(picture.request.prompt_index, item.prompt)] = float(alone)
    return {"prompts": scores}


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
    """Cut a grid of two by two into its images, or take one image as it is.

    Raises:
        UserError: it has a side that two equal images do not make.
    """
    if number == 1:
        return [image]
    if image.width % 2 or image.height % 2:
        raise UserError(
            f"A picture of {image.width} x {image.height} pixels is no grid of two by two; give --images-per-prompt 1 for single "
            "images."
        )
    width, height = image.width // 2, image.height // 2
    places = [(place % 2 * width, place // 2 * height) for place in range(4)]
    return [image.crop((left, top, left + width, top + height)) for left, top in places]


def answerer_record(name: str) -> Record:
    """Return what the model that answers is told by; modelscope fetches mPLUG itself, and is told by its version."""
    if name == "mplug":
        return {"answerer": MPLUG, "library": versions_of("modelscope")}
    return {"answerer_sha256": model_digest(model_folder(name, judge_parts))}


def ask_all(
    items: list[Item],
    files: list[Path],
    images: int,
    products: list[Product],
    settings: Settings,
    answerer: Callable[[], YesOrNo],
    progress: Progress | None,
) -> list[list[dict[int, str]]]:
    """Ask about the images of every prompt that is not answered yet; returns all answers, of all ranks."""

    def answers(number: int) -> bytes:
        with open_picture(files[number]) as image:
            of_images = [
                {
                    key: answerer().answer(tile, each.question)
                    for key, each in items[number].propositions.items()
                }
                for tile in tiles(image.convert("RGB"), images)
            ]
        return json.dumps(of_images).encode()

    fill(products, settings.out / "claims" / "answers", answers, progress)
    return [
        [
            {int(key): answer for key, answer in of_image.items()}
            for of_image in read_json(product.path, ANSWERS)
        ]
        for product in products
    ]


def _device() -> str:
    return str(inference_device(local_rank()))


def table(results: dict[str, Any]) -> str:
    """Return the scores as Markdown tables, with what they differ in from published ones."""
    header = ["DPG-Bench", heading(results, "overall"), *results["categories_l1"]]
    overall, found = "-", main_score(results, "overall")
    if found is not None:
        overall = with_error(found, main_score(results, "standard_error"), digits=2)
    row = [results["protocol"], overall, *(f"{value:.2f}" for value in results["categories_l1"].values())]
    notes = "".join(f"- {note}\n" for note in (*results["differences"], f"cut: {results['cut']}"))
    return f"{markdown_table(header, [row])}\n{notes}"
