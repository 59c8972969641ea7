"""Images of prompts, made by all ranks of a job: each a file that is there whole or not at all.

An image depends on its prompt's number, its own number and the seed. The images of a batch are made together and their batches are
cut the same way in every run, so that neither the number of ranks nor a restart changes a bit.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import SchedulerMixin
from PIL import Image

from rmoe_megatron.config.buckets import Bucket
from rmoe_megatron.distributed.device import inference_device
from rmoe_megatron.distributed.launch import is_main_process, local_rank, rank, world_size
from rmoe_megatron.distributed.work_queue import WorkQueue
from rmoe_megatron.files import atomic
from rmoe_megatron.inference.fingerprints import pipeline_record
from rmoe_megatron.inference.provenance import (
    Product,
    Record,
    content_digest,
    digest,
    png_with,
)
from rmoe_megatron.inference.sampling import (
    conditions_of,
    describe_place,
    load_sampler,
    open_pipeline,
    sample_images,
    set_depth,
)
from rmoe_megatron.pretrained.model_files import MODEL_INDEX
from rmoe_megatron.versions import INFERENCE, versions_of

Progress = Callable[[int, int], None]
# Pictures that are made in one way. The parts of an evaluation may differ in steps and depth; their model is the same.
type Part = tuple[Sampling, Sequence[Picture]]
OF_ONE_IMAGE = ("prompt", "prompt_number", "image_number")  # in its record; the rest is that of all


@dataclass(frozen=True)
class Sampling:
    """How images are made; all of it is part of a result.

    ``dtype`` is fp32, fp16 or bf16; see :func:`rmoe_megatron.inference.sampling.resolve_dtype`.
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
    size: Bucket | None = None  # None is the model's square
    depth: int | None = None  # loops or latent steps; None is as trained

    @property
    def is_given(self) -> bool:
        """Whether the model is a folder of images, to be scored as they are."""
        return is_folder_of_images(Path(self.model))


@dataclass(frozen=True)
class ImageRequest:
    """One image to make: its prompt, its number among that prompt's images, and its file.

    ``seed`` is that of its noise; None is one that follows from the evaluation's seed and both numbers.
    """

    prompt: str
    prompt_index: int
    image_index: int
    path: Path
    seed: int | None = None


class Picture:
    """An image of a benchmark, which this evaluation makes or finds in a folder.

    Args:
        product: the file that is made; None if it is given.
    """

    def __init__(self, request: ImageRequest, product: Product | None) -> None:
        self.request, self.product = request, product

    @functools.cached_property
    def identity(self) -> str:
        """What tells it from other pictures: a digest of its record, or of its content if it is given."""
        return digest(self.product.record) if self.product else content_digest(self.request.path)


def image_seed(seed: int, prompt_index: int, image_index: int) -> int:
    """Return a seed of its own for every image."""
    return seed_of(seed, prompt_index, image_index)


def seed_of(*numbers: int) -> int:
    """Return a seed that numbers from 0 up give, of 32 bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def sampling_record(sampling: Sampling, sampler: SchedulerMixin | None = None) -> Record:
    """Return what the images of a diffusers folder depend on besides prompt and number, with all defaults resolved.

    Args:
        sampler: which takes the place of that of the folder or of ``sampling``.

    Raises:
        UserError: the folder holds no pipeline, or the sampler does not fit it.
    """
    folder = Path(sampling.model)
    sampler = sampler or load_sampler(folder, sampling.scheduler)
    return {
        "weights": pipeline_record(folder),
        "sampler": {"class": type(sampler).__name__, **_settings(sampler.config)},
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "guidance_interval": list(sampling.guidance_interval),
        "negative_prompt": sampling.negative_prompt,
        "seed": sampling.seed,
        "batch_size": sampling.batch_size,
        "dtype": sampling.dtype,
        "compile": sampling.compile,
        "size": str(sampling.size) if sampling.size is not None else None,
        "depth": sampling.depth,
        "device": inference_device(local_rank()).type,
        "versions": versions_of(*INFERENCE),
    }


def _settings(config: Any) -> Record:
    """Return a sampler's settings as JSON has them; it has no infinity, which is DPM-Solver's lambda_min_clipped."""
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in settings.items()
    }


def image_product(request: ImageRequest, record: Record) -> Product:
    """Return an image to be made; ``record`` is what all images of the evaluation have in theirs."""
    values = (request.prompt, request.prompt_index, request.image_index)
    of_one = dict(zip(OF_ONE_IMAGE, values, strict=True))
    return Product(request.path, lambda: of_one | record)


def build_pipeline(sampling: Sampling) -> Any:
    """Load a model onto this rank's device; see :func:`rmoe_megatron.inference.sampling.open_pipeline`.

    Raises:
        UserError: the folder or a setting is wrong.
    """
    pipeline = open_pipeline(Path(sampling.model), sampling.dtype, sampling.scheduler, sampling.compile)
    if sampling.depth is not None:
        set_depth(pipeline, sampling.depth)
    return pipeline


def filled_by_the_job(out: Path) -> AbstractContextManager[None]:
    """Return the context in which the ranks of a job put files into a folder, while no other job does: rank 0 holds it for all.

    Raises:
        UserError: another process puts files there; says which.
    """
    return atomic.filling(out) if rank() == 0 else nullcontext()


def generate(parts: Sequence[Part], claims: Path, progress: Progress | None = None) -> None:
    """Make the images that are not there yet; every rank takes part, and returns when all images are there.

    Args:
        parts: the same on every rank, in the same order; nothing is done for pictures that are given.
        claims: folder of the ranks' claims.
        progress: called with (images done by all ranks, images in total).

    Raises:
        UserError: the model cannot be loaded or does not take the prompts.
    """
    batches = [(sampling, batch) for sampling, pictures in parts for batch in _batches(pictures, sampling)]
    done_before = list(itertools.accumulate((len(batch) for _, batch in batches), initial=0))

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(done_before[done], done_before[total])

    claims.parent.mkdir(parents=True, exist_ok=True)
    queue = WorkQueue(
        claims,
        len(batches),
        lambda number: all(product.is_made for _, product in batches[number][1]),
        first=rank() * len(batches) // world_size(),
    )
    if is_main_process() and not all(product.is_made for _, batch in batches for _, product in batch):
        print(f"images are made {describe_place(batches[0][0].dtype)}")
    prompts = [request.prompt for _, batch in batches for request, _ in batch]
    model = _LoadedOnce(prompts)
    with _cleared(claims), closing(queue.take(report)) as numbers:
        for number in numbers:
            sampling, batch = batches[number]
            images = sample_images(
                model.pipeline(sampling),
                [request.prompt for request, _ in batch],
                [_seed_of(request, sampling) for request, _ in batch],
                sampling.steps,
                sampling.guidance,
                sampling.batch_size,
                guidance_interval=sampling.guidance_interval,
                negative_prompt=sampling.negative_prompt,
                size=sampling.size,
            )
            for (_, product), image in zip(batch, images, strict=True):
                if not product.is_made:
                    product.write(png_with(Image.fromarray(image), product.record))


@contextmanager
def _cleared(claims: Path) -> Iterator[None]:
    """Leave no folder of claims when a process that works alone fails; that of several ranks is the others', too."""
    try:
        yield
    except BaseException:
        if world_size() == 1:
            with suppress(OSError):
                claims.rmdir()
        raise


def _batches(pictures: Sequence[Picture], sampling: Sampling) -> list[list[tuple[ImageRequest, Product]]]:
    """Return what is to be made, cut into the batches that are made together."""
    wanted = [(each.request, each.product) for each in pictures if each.product is not None]
    size = sampling.batch_size
    return [wanted[start : start + size] for start in range(0, len(wanted), size)]


def _seed_of(request: ImageRequest, sampling: Sampling) -> int:
    if request.seed is not None:
        return request.seed
    return image_seed(sampling.seed, request.prompt_index, request.image_index)


class _LoadedOnce:
    """The model of an evaluation, loaded by who makes an image, and set to the depth of each batch.

    Args:
        prompts: the prompts of all images; a wrong one is named before the first image.
    """

    def __init__(self, prompts: list[str]) -> None:
        self.prompts = prompts
        self._pipeline: Any = None
        self._depth: int | None = None

    def pipeline(self, sampling: Sampling) -> Any:
        """Return the model's pipeline; see :func:`build_pipeline`."""
        if self._pipeline is None or (sampling.depth is None and self._depth is not None):
            self._pipeline = build_pipeline(sampling)
            conditions_of(self._pipeline, self.prompts)
        elif sampling.depth is not None and sampling.depth != self._depth:
            set_depth(self._pipeline, sampling.depth)
        self._depth = sampling.depth
        return self._pipeline


def fill(
    products: Sequence[Product], claims: Path, make: Callable[[int], bytes], progress: Progress | None = None
) -> None:
    """Write the files that are not there yet, each by one rank; every rank takes part, and returns when all are there.

    Args:
        make: from a file's number to its content.
    """
    claims.parent.mkdir(parents=True, exist_ok=True)
    queue = WorkQueue(
        claims,
        len(products),
        lambda number: products[number].is_made,
        rank() * len(products) // world_size(),
    )
    for number in queue.take(progress):
        products[number].write(make(number))


def is_folder_of_images(model: Path) -> bool:
    """Whether ``model`` holds images to be scored as they are, not a diffusers pipeline."""
    return model.is_dir() and not (model / MODEL_INDEX).exists()
