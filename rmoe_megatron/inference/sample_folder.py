"""The images of ``rmoe sample`` in a folder, made batch by batch by all ranks of a job: a command that was ended goes on where it was."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rmoe_megatron.distributed.launch import rank
from rmoe_megatron.files import atomic
from rmoe_megatron.files.images import labelled_grid, open_picture, png
from rmoe_megatron.inference.generation import (
    ImageRequest,
    Picture,
    Progress,
    Sampling,
    filled_by_the_job,
    generate,
    image_product,
    sampling_record,
)


def fill_folder(
    folder: Path, prompts: Sequence[str], sampling: Sampling, progress: Progress | None = None
) -> list[Path]:
    """Make an image for every prompt, ``00000.png`` and so on, and ``grid.png`` of them all; every rank takes part.

    The noise of an image has the seed of ``sampling`` plus its number. Every image carries a record of what it was made by. Those that
    a command of the same settings has left are kept, a batch if all of it is there; images of other settings give way.

    Args:
        prompts: texts, or class labels.
        progress: called with (images done by all ranks, images in total).

    Returns:
        Images of an earlier command with more prompts, which stay.

    Raises:
        UserError: the model cannot be loaded or does not take the prompts, the size or the depth, or another job writes here.
    """
    record = sampling_record(sampling)
    requests = [
        ImageRequest(prompt, number, number, folder / f"{number:05d}.png", sampling.seed + number)
        for number, prompt in enumerate(prompts)
    ]
    pictures = [Picture(request, image_product(request, record)) for request in requests]
    with filled_by_the_job(folder):
        generate([(sampling, pictures)], folder / ".claims", progress)
        if rank() == 0:
            _write_grid(requests, folder)
    return [path for path in sorted(folder.glob("[0-9]*.png")) if path.stem >= f"{len(prompts):05d}"]


def _write_grid(requests: Sequence[ImageRequest], folder: Path) -> None:
    images = []
    for request in requests:
        with open_picture(request.path) as file:
            images.append(np.asarray(file.convert("RGB")))
    grid = labelled_grid(np.stack(images), [request.prompt for request in requests])
    atomic.write(folder / "grid.png", png(grid))
