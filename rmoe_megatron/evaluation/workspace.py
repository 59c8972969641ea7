"""The images and answers of a benchmark: which there are to make, or to find in a folder, and of which evaluation they are."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.picture_folder import require_pictures
from rmoe_megatron.inference.generation import (
    OF_ONE_IMAGE,
    ImageRequest,
    Picture,
    Sampling,
    image_product,
    sampling_record,
)
from rmoe_megatron.inference.provenance import (
    Product,
    Record,
    digest,
    read_record,
    require_records,
    require_results,
)


def plan(
    requests_below: Callable[[Path], list[ImageRequest]],
    sampling: Sampling,
    out: Path,
    allow_incomplete: bool = False,
    layout: Callable[[Path], list[ImageRequest]] | None = None,
) -> tuple[list[Picture], Record]:
    """Return the images of a benchmark, to be made below ``out/images`` or those of a folder, and what a result says of them.

    Args:
        requests_below: from a folder to what is to be scored there.
        allow_incomplete: score what a folder has, and say what is wrong with it; otherwise all has to be right.
        layout: from a folder to all that may be there.

    Raises:
        UserError: something is wrong with the folder, or it has images of other prompts; or the model's folder holds no pipeline.
    """
    if not sampling.is_given:
        record = sampling_record(sampling)
        requests = requests_below(out / "images")
        return [Picture(request, image_product(request, record)) for request in requests], record
    folder = Path(sampling.model)
    requests = requests_below(folder)
    paths = [request.path for request in requests]
    known = [request.path for request in layout(folder)] if layout is not None else None
    found, report = require_pictures(paths, folder, allow_incomplete, known)
    usable = set(found)
    requests = [request for request in requests if request.path in usable]
    for request in requests:
        _require_prompt(request)
    pictures = [Picture(request, None) for request in requests]
    record = given_record(pictures)
    return pictures, record | {"folder": report.problems()} if report.problems() else record


def _require_prompt(request: ImageRequest) -> None:
    made_of = (read_record(request.path) or {}).get("prompt", request.prompt)
    if made_of != request.prompt:
        raise UserError(
            f"{request.path} was made of {made_of!r:.80}, but is to be scored as {request.prompt!r:.80}; give the prompts that the "
            "images were made of."
        )


def given_record(pictures: Sequence[Picture]) -> Record:
    """Return what is known of the images of a folder: a digest of them all, and what made them if all say the same."""
    records = [read_record(picture.request.path) or {} for picture in pictures]
    common = [{key: value for key, value in each.items() if key not in OF_ONE_IMAGE} for each in records]
    made_by = common[0] if common[0] and all(each == common[0] for each in common) else None
    return {"images": digest([picture.identity for picture in pictures]), "made_by": made_by}


def products_of(pictures: Sequence[Picture]) -> list[Product]:
    """Return the files of the pictures that are made here."""
    return [picture.product for picture in pictures if picture.product is not None]


def answer_products(
    paths: Sequence[Path], asked: Sequence[object], pictures: Sequence[Sequence[Picture]], common: Record
) -> list[Product]:
    """Return the files of what judges say, one for every prompt.

    Args:
        paths: where they lie.
        asked: what is asked about every prompt's pictures, as JSON has it.
        pictures: the pictures of every prompt.
        common: what the records of all of them have: rules and judge.
    """

    def record(what: object, of_prompt: Sequence[Picture]) -> Record:
        return {"asked": digest(what), "pictures": [picture.identity for picture in of_prompt]} | common

    return [
        Product(path, functools.partial(record, what, of_prompt))
        for path, what, of_prompt in zip(paths, asked, pictures, strict=True)
    ]


def grouped_by_prompt(pictures: Sequence[Picture]) -> dict[int, list[Picture]]:
    """Return the pictures of every prompt that has some, by its number."""
    found: dict[int, list[Picture]] = {}
    for picture in pictures:
        found.setdefault(picture.request.prompt_index, []).append(picture)
    return found


def folder_differences(record: Record) -> list[str]:
    """Return in what a folder of images that is scored differs from what it should be, for a result."""
    problems = record.get("folder", {})
    counts = ", ".join(f"{len(names)} {kind.replace('_', ' ')}" for kind, names in problems.items())
    return [f"the folder's images are not all as they should be: {counts}"] if problems else []


def check_out(out: Path, products: Sequence[Product], identity: Record, again: bool) -> None:
    """Check before anything is made that what lies in ``out`` is of this evaluation; see :mod:`rmoe_megatron.inference.provenance`.

    Raises:
        UserError: something of another evaluation lies there, and ``again`` does not ask to make it anew.
    """
    require_results(out / "results.json", identity, again)
    require_records(products, again)
