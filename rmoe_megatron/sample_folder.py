"""The images of ``rmoe sample`` in a folder, written batch by batch: a command that was ended goes on where it was."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from rmoe_megatron import durable
from rmoe_megatron.config.buckets import Bucket
from rmoe_megatron.evaluation.generation import Sampling, build_pipeline, sampling_record
from rmoe_megatron.evaluation.provenance import Product, png_with
from rmoe_megatron.pictures import labelled_grid, open_picture, png
from rmoe_megatron.sampling import conditions_of, describe_place, sample_images, set_depth


def fill_folder(
    folder: Path,
    prompts: list[str],
    sampling: Sampling,
    size: Bucket | None = None,
    depth: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Make an image for every prompt, ``00000.png`` and so on, and ``grid.png`` of them all.

    The noise of an image has the seed of ``sampling`` plus its number. Every image carries a record of what it was made by. Those that
    a command of the same settings has left are kept, a batch if all of it is there; images of other settings give way.

    Args:
        size: of the images; None is the model's square.
        depth: loops or latent steps; None is what the model was trained with.
        progress: called with (images done, images in total).

    Returns:
        Images of an earlier command with more prompts, which stay.

    Raises:
        UserError: the model cannot be loaded or does not take the prompts, the size or the depth, or another process writes here.
    """
    record = sampling_record(sampling) | {"depth": depth, "size": None if size is None else str(size)}
    products = [
        Product(
            folder / f"{number:05d}.png",
            functools.partial(dict, {"prompt": prompt} | record | {"image_number": number}),
        )
        for number, prompt in enumerate(prompts)
    ]
    with durable.filling(folder):
        _make(products, prompts, sampling, size, depth, progress)
        images = np.stack([np.asarray(open_picture(product.path)) for product in products])
        durable.write(folder / "grid.png", png(labelled_grid(images, prompts)))
    return [path for path in sorted(folder.glob("[0-9]*.png")) if path.stem >= f"{len(prompts):05d}"]


def _make(
    products: list[Product],
    prompts: list[str],
    sampling: Sampling,
    size: Bucket | None,
    depth: int | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Make the batches that are not there, with a model that is loaded if there is one."""
    starts = range(0, len(prompts), sampling.batch_size)
    batches = [slice(start, start + sampling.batch_size) for start in starts]
    missing = [part for part in batches if not all(product.is_made for product in products[part])]
    if not missing:
        return
    print(f"images are made {describe_place(sampling.dtype)}")
    pipeline = build_pipeline(sampling)
    if depth is not None:
        set_depth(pipeline, depth)
    conditions_of(pipeline, prompts)  # a wrong one is named before the first image
    done = len(prompts) - sum(len(products[part]) for part in missing)
    if progress is not None:
        progress(done, len(prompts))
    for part in missing:
        images = sample_images(
            pipeline,
            prompts[part],
            list(range(sampling.seed + part.start, sampling.seed + part.start + len(prompts[part]))),
            sampling.steps,
            sampling.guidance,
            sampling.batch_size,
            guidance_interval=sampling.guidance_interval,
            size=size,
        )
        for product, image in zip(products[part], images, strict=True):
            product.write(png_with(Image.fromarray(image), product.record))
        done += len(images)
        if progress is not None:
            progress(done, len(prompts))
