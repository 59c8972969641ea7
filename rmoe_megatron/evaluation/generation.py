"""Images of a benchmark's prompts, made by all ranks of a job: each a file that is there whole or not at all.

An image depends on its prompt's number, its own number and the seed. The images of a batch are made together and their batches are
cut the same way in every run, so that neither the number of ranks nor a restart changes a bit.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import TypeAdapter

from rmoe_megatron import durable
from rmoe_megatron.errors import UserError
from rmoe_megatron.launch import rank, speaks, world_size
from rmoe_megatron.pictures import png
from rmoe_megatron.sampling import describe_place, open_pipeline, sample_images
from rmoe_megatron.typed_files import read_json
from rmoe_megatron.work_queue import WorkQueue

Progress = Callable[[int, int], None]
MADE_BY = "made_by.json"
DESCRIPTION = TypeAdapter(dict[str, Any])
MODEL_INDEX = "model_index.json"  # what a diffusers folder has and a folder of images has not


@dataclass(frozen=True)
class Sampling:
    """How images are made; all of it is part of a result.

    ``dtype`` is fp32, fp16 or bf16; see :func:`rmoe_megatron.sampling.resolve_dtype`.
    """

    model: str
    steps: int
    guidance: float
    seed: int
    batch_size: int
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    scheduler: str | None = None
    negative_prompt: str | None = None
    dtype: str = "fp32"
    compile: bool = False

    def described(self) -> dict[str, Any]:
        """Return what of it changes images, for a result; of a folder of images its name."""
        if is_folder_of_images(Path(self.model)):
            return {"images": self.model}
        return {
            name: value for name, value in asdict(self).items() if value is not None and value is not False
        }


@dataclass(frozen=True)
class ImageRequest:
    """One image: of which prompt, the how-manieth of it, and the file."""

    prompt: str
    prompt_index: int
    image_index: int
    path: Path


def image_seed(seed: int, prompt_index: int, image_index: int) -> int:
    """Return a seed of its own for every image."""
    return int(np.random.SeedSequence([seed, prompt_index, image_index]).generate_state(1)[0])


def build_pipeline(sampling: Sampling) -> Any:
    """Load a model onto this rank's device; see :func:`rmoe_megatron.sampling.open_pipeline`.

    Raises:
        UserError: the folder or a setting is wrong.
    """
    return open_pipeline(Path(sampling.model), sampling.dtype, sampling.scheduler, sampling.compile)


def generate(
    requests: Sequence[ImageRequest], sampling: Sampling, claims: Path, progress: Progress | None = None
) -> None:
    """Make the images that are not there yet; every rank takes part, and returns when all images are there.

    Args:
        requests: the same on every rank, in the same order.
        claims: folder of the ranks' claims.
        progress: called with (images done by all ranks, images in total).

    Raises:
        UserError: the model cannot be loaded or does not take the prompts.
    """
    batches = [
        requests[start : start + sampling.batch_size]
        for start in range(0, len(requests), sampling.batch_size)
    ]

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(min(done * sampling.batch_size, len(requests)), len(requests))

    queue = WorkQueue(
        claims,
        len(batches),
        lambda number: all(request.path.exists() for request in batches[number]),
        first=rank() * len(batches) // world_size(),
    )
    pipeline = None
    if speaks() and not all(request.path.exists() for request in requests):
        print(f"images are made {describe_place(sampling.dtype)}")
    for number in queue.take(report):
        if pipeline is None:
            pipeline = build_pipeline(sampling)
        batch = batches[number]
        images = sample_images(
            pipeline,
            [request.prompt for request in batch],
            [image_seed(sampling.seed, request.prompt_index, request.image_index) for request in batch],
            sampling.steps,
            sampling.guidance,
            sampling.batch_size,
            guidance_interval=sampling.guidance_interval,
            negative_prompt=sampling.negative_prompt,
        )
        for request, image in zip(batch, images, strict=True):
            request.path.parent.mkdir(parents=True, exist_ok=True)
            if not request.path.exists():
                with durable.writing(request.path) as partial:
                    partial.write_bytes(png(Image.fromarray(image)))


def make_or_require(
    requests_below: Callable[[Path], list[ImageRequest]],
    sampling: Sampling,
    out: Path,
    progress: Progress | None,
) -> list[ImageRequest]:
    """Return the images of a benchmark: made below ``out/images``, or those of the folder that stands in the model's place.

    Args:
        requests_below: from a folder to what belongs there.

    Raises:
        UserError: the folder lacks images, or ``out`` holds another evaluation.
    """
    model = Path(sampling.model)
    if is_folder_of_images(model):
        require_same(out, {"model": str(model.absolute())})
        requests = requests_below(model)
        require_images(requests, model)
    else:
        require_same(out, sampling.described())
        requests = requests_below(out / "images")
        generate(requests, sampling, out / "claims" / "images", progress)
    return requests


def require_same(out: Path, description: dict[str, Any]) -> None:
    """Check that what lies in ``out`` was made in the same way, or write down how it is going to be made.

    Raises:
        UserError: it was made in another way; names the difference.
    """
    path = out / MADE_BY
    described = json.loads(json.dumps(description))
    if not path.is_file():
        out.mkdir(parents=True, exist_ok=True)
        with durable.writing(path) as partial:
            partial.write_text(json.dumps(described, indent=1) + "\n")
    found = read_json(path, DESCRIPTION)
    for key in {**found, **described}:
        if found.get(key) != described.get(key):
            raise UserError(
                f"{out} holds an evaluation with {key} {found.get(key)!r:.80}, not {described.get(key)!r:.80}; choose another "
                "--out, or remove it first."
            )


def fill(
    files: Sequence[Path], claims: Path, make: Callable[[int], bytes], progress: Progress | None = None
) -> None:
    """Write the files that are not there yet, each by one rank; every rank takes part, and returns when all are there.

    Args:
        make: from a file's number to its content.
    """
    queue = WorkQueue(
        claims, len(files), lambda number: files[number].exists(), rank() * len(files) // world_size()
    )
    for number in queue.take(progress):
        files[number].parent.mkdir(parents=True, exist_ok=True)
        content = make(number)
        with durable.writing(files[number]) as partial:
            partial.write_bytes(content)


def require_images(requests: Sequence[ImageRequest], folder: Path) -> None:
    """Check that a folder that is scored as it is holds every image.

    Raises:
        UserError: names the first that is missing, and how many are.
    """
    missing = [request.path for request in requests if not request.path.is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of {len(requests)} images, {missing[0].relative_to(folder)} the first; "
            "generate them, or give a diffusers folder to generate them from."
        )


def is_folder_of_images(model: Path) -> bool:
    """Whether ``model`` holds images to be scored as they are, not a diffusers pipeline."""
    return model.is_dir() and not (model / MODEL_INDEX).exists()
