"""ImageNet-256 from classes to scores: images and features in parts, by all ranks, summed up by rank 0."""

import functools
import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from rmoe_megatron import durable
from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.fingerprints import file_digest
from rmoe_megatron.evaluation.generation import (
    Progress,
    Sampling,
    build_pipeline,
    check_out,
    fill,
    image_seed,
    sampling_record,
)
from rmoe_megatron.evaluation.imagenet.features import WEIGHTS, WEIGHTS_SHA256, Features, Inception
from rmoe_megatron.evaluation.imagenet.metrics import (
    Gaussian,
    RunningGaussian,
    frechet_distance,
    inception_score,
    precision_and_recall,
)
from rmoe_megatron.evaluation.provenance import Product, Record, content_digest, digest
from rmoe_megatron.evaluation.results import markdown_table, write_results
from rmoe_megatron.launch import local_rank, rank, speaks
from rmoe_megatron.pictures import labelled_grid, open_picture, png
from rmoe_megatron.platform import inference_device
from rmoe_megatron.refusal import refusal
from rmoe_megatron.regular_files import check_regular, open_regular
from rmoe_megatron.sampling import describe_place, sample_images
from rmoe_megatron.versions import INFERENCE, versions_of

NUM_IMAGES = 50_000  # of FID-50K
REFERENCE_PART = 500  # images of the reference whose features are computed together
SHOWN = 64  # images of the grid

Extract = Callable[[NDArray[np.uint8]], Features]


@dataclass(frozen=True)
class Settings:
    """How many images of which classes, and what they are compared with.

    ``balanced`` takes the classes in turn; else they are drawn from the seed.
    """

    out: Path
    reference: Path
    inception: Path
    num_images: int = NUM_IMAGES
    num_classes: int = 1000
    balanced: bool = True
    again: bool = False  # make anew what was made by another command, which is refused otherwise


@dataclass(frozen=True)
class Reference:
    """ADM's reference: so many images uint8 [N, H, W, 3], read in parts, and their statistics if the file has them."""

    path: Path
    shape: tuple[int, ...]
    pool: Gaussian | None
    spatial: Gaussian | None

    def images(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return some of the images; the others are not kept in memory."""
        size = int(np.prod(self.shape[1:]))
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
            _read_header(member)
            member.seek(start * size, io.SEEK_CUR)
            content = member.read((min(stop, self.shape[0]) - start) * size)
        return np.frombuffer(content, dtype=np.uint8).reshape(-1, *self.shape[1:])


def evaluate_imagenet(
    sampling: Sampling,
    settings: Settings,
    progress: Callable[[str], Progress | None],
    extract: Extract | None = None,
) -> None:
    """Make the images, compute features and write the results; every rank takes part, what is there is not done again.

    ``out`` gets ``parts/`` (images) and ``features/``, ``samples.npz`` in ADM's layout, ``gallery.png`` and the results.

    Args:
        extract: computes features; None is :class:`Inception`.

    Raises:
        UserError: a file is missing or not what it should be.
    """
    out = settings.out
    reference = open_reference(settings.reference)
    if extract is None and not settings.inception.is_file():
        raise UserError(
            f"There is no file {settings.inception} (--inception); get torch-fidelity's {WEIGHTS}."
        )
    classes = class_labels(settings, sampling.seed)
    given = _given_images(sampling, len(classes))
    made = (
        sampling_record(sampling) if given is None else {"images": digest(list(map(content_digest, given)))}
    )
    judge = _judge_record(settings, extract)
    identity: Record = {
        "benchmark": "ImageNet 256",
        "classes": "balanced" if settings.balanced else "random",
        "class_labels": {"number": len(classes), "sha256": digest(classes.tolist())},
        "sampling": made,
        "judge": judge,
    }
    parts = _part_products(out / "parts", classes, sampling, made, given)
    features, of_reference = _feature_products(out, parts, reference, judge)
    check_out(out, [*parts, *features, *of_reference], identity, settings.again)
    _make_parts(parts, classes, sampling, given, out, progress("sample"))
    device = inference_device(local_rank())
    network = functools.cache(lambda: extract or Inception(settings.inception, device))

    def extractor(images: NDArray[np.uint8]) -> Features:
        return network()(images)

    _compute_features(
        features, lambda number: _load(parts[number].path), out / "claims" / "features", extractor, progress("features"),
    )  # fmt: skip
    _compute_features(
        of_reference,
        lambda number: reference.images(number * REFERENCE_PART, (number + 1) * REFERENCE_PART),
        out / "claims" / "reference_features", extractor, progress("reference"),
    )  # fmt: skip
    if rank() == 0:
        paths = _paths(parts)
        write_npz(out / "samples.npz", paths, settings.num_images)
        results = identity | {
            "model": str(Path(sampling.model).absolute()),
            "reference": str(settings.reference),
            "extractor": "torch-fidelity's Inception v3 with TensorFlow's weights of 2015-12-05",
            "differences": _differences(settings, judge),
            **compare(_paths(features), _paths(of_reference), reference, device),
        }
        write_results(out, results, table(results), [])
        shown = _load(paths[0])[:SHOWN]
        durable.write(
            out / "gallery.png", png(labelled_grid(shown, [str(each) for each in classes[: len(shown)]]))
        )


def _paths(products: list[Product]) -> list[Path]:
    return [product.path for product in products]


def _differences(settings: Settings, judge: Record) -> list[str]:
    """Return in what a result differs from published ones."""
    differences = [
        "precision and recall from distances in float32 (the published code takes float16 where it can)"
    ]
    if not str(judge["extractor"]).startswith(WEIGHTS_SHA256):
        differences.insert(
            0, f"features of {settings.inception.name}, not of torch-fidelity's published weights"
        )
    if settings.num_images != NUM_IMAGES:
        differences.insert(0, f"{settings.num_images} images: not FID-50K")
    return differences


def class_labels(settings: Settings, seed: int) -> NDArray[np.int64]:
    """Return the class of every image."""
    if settings.balanced:
        return np.arange(settings.num_images) % settings.num_classes
    return np.random.default_rng([seed, settings.num_images]).integers(
        0, settings.num_classes, settings.num_images
    )


def _given_images(sampling: Sampling, number: int) -> list[Path] | None:
    """Return the images of a folder in the model's place, None if there is a model.

    Raises:
        UserError: the folder holds too few.
    """
    if not sampling.is_given:
        return None
    found = sorted(Path(sampling.model).rglob("*.png"))
    if len(found) < number:
        raise UserError(f"{sampling.model} holds {len(found)} PNG files, fewer than --num-images {number}.")
    return found[:number]


def _part_products(
    folder: Path, classes: NDArray[np.int64], sampling: Sampling, record: Record, given: list[Path] | None
) -> list[Product]:
    """Return the files of the images, a batch in each."""

    def of_part(start: int) -> Record:
        numbers = range(start, min(start + sampling.batch_size, len(classes)))
        if given is not None:
            return {"images": [content_digest(given[number]) for number in numbers]}
        return {"first": start, "class_labels": [int(classes[number]) for number in numbers]} | record

    return [
        Product(folder / f"{number:06d}.npy", functools.partial(of_part, start))
        for number, start in enumerate(range(0, len(classes), sampling.batch_size))
    ]


def _judge_record(settings: Settings, extract: Extract | None) -> Record:
    """Return what a comparison depends on besides the images."""
    return {
        "reference_sha256": file_digest(settings.reference),
        "extractor": file_digest(settings.inception) if extract is None else extract.__qualname__,
        "device": inference_device(local_rank()).type,
        "versions": versions_of(*INFERENCE, "torch-fidelity"),
    }


def _feature_products(
    out: Path, parts: list[Product], reference: Reference, judge: Record
) -> tuple[list[Product], list[Product]]:
    """Return the files of the features of every part, and of every part of the reference."""
    features = [
        Product(out / "features" / f"{number:06d}.npz", functools.partial(_features_record, part, judge))
        for number, part in enumerate(parts)
    ]
    starts = range(0, reference.shape[0], REFERENCE_PART)
    of_reference = [
        Product(
            out / "reference_features" / f"{number:06d}.npz",
            functools.partial(_reference_record, start, judge),
        )
        for number, start in enumerate(starts)
    ]
    return features, of_reference


def _features_record(part: Product, judge: Record) -> Record:
    without_reference = {key: value for key, value in judge.items() if key != "reference_sha256"}
    return {"part": digest(part.record)} | without_reference


def _reference_record(start: int, judge: Record) -> Record:
    return {"first": start, "images": REFERENCE_PART} | judge


def _make_parts(
    parts: list[Product],
    classes: NDArray[np.int64],
    sampling: Sampling,
    given: list[Path] | None,
    out: Path,
    progress: Progress | None,
) -> None:
    pipeline = functools.cache(lambda: build_pipeline(sampling))

    def images(number: int) -> bytes:
        indices = range(number * sampling.batch_size, min((number + 1) * sampling.batch_size, len(classes)))
        if given is not None:
            made = np.stack([np.asarray(open_picture(given[index]).convert("RGB")) for index in indices])
        else:
            made = sample_images(
                pipeline(), [str(classes[index]) for index in indices],
                [image_seed(sampling.seed, index, 0) for index in indices],
                sampling.steps, sampling.guidance, sampling.batch_size, guidance_interval=sampling.guidance_interval,
            )  # fmt: skip
        buffer = io.BytesIO()
        np.save(buffer, made)
        return buffer.getvalue()

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(min(done * sampling.batch_size, len(classes)), len(classes))

    if given is None and speaks() and not all(part.is_made for part in parts):
        print(f"images are made {describe_place(sampling.dtype)}")
    fill(parts, out / "claims" / "parts", images, report)


def _compute_features(
    products: list[Product],
    images_of: Callable[[int], NDArray[np.uint8]],
    claims: Path,
    extract: Extract,
    progress: Progress | None,
) -> None:
    """Compute the features of every unit that has none yet."""

    def features(number: int) -> bytes:
        found, buffer = extract(np.ascontiguousarray(images_of(number))), io.BytesIO()
        np.savez(buffer, pool=found.pool, spatial=found.spatial, probabilities=found.probabilities)
        return buffer.getvalue()

    fill(products, claims, features, progress)


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(member)


def open_reference(path: Path) -> Reference:
    """Open a reference npz; nothing in it is unpickled.

    Raises:
        UserError: there is no such file, or it holds no images.
    """
    if not path.is_file():  # may be a link: the user names it
        raise UserError(f"There is no file {path} (--reference); get ADM's VIRTUAL_imagenet256_labeled.npz.")
    with refusal(f"{path} cannot be read as a reference"), np.load(path, allow_pickle=False) as file:
        names = set(file.files)
        gaussians = [
            Gaussian(file[mean].astype(np.float64), file[covariance].astype(np.float64))
            if {mean, covariance} <= names
            else None
            for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s"))
        ]
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            shape, is_fortran, dtype = _read_header(member)
    if len(shape) != 4 or dtype != np.uint8 or is_fortran or shape[-1] != 3:
        raise UserError(f"{path} holds no images uint8 [N, H, W, 3] under arr_0, as ADM's references do.")
    return Reference(path, shape, *gaussians)


def compare(
    features: list[Path], of_reference: list[Path], reference: Reference, device: torch.device
) -> dict[str, float | int]:
    """Return the scores of samples against a reference, from files of features read one by one."""
    pool, spatial = _gaussian(features, "pool"), _gaussian(features, "spatial")
    real_pool = reference.pool or _gaussian(of_reference, "pool")
    real_spatial = reference.spatial or _gaussian(of_reference, "spatial")
    samples, real = (np.concatenate(list(_read(files, "pool"))) for files in (features, of_reference))
    precision, recall = precision_and_recall(real, samples, device)
    return {
        "fid": frechet_distance(pool, real_pool),
        "sfid": frechet_distance(spatial, real_spatial),
        "inception_score": inception_score(_read(features, "probabilities")),
        "precision": precision,
        "recall": recall,
        "images": len(samples),
        "reference_images": len(real),
    }


def _gaussian(files: list[Path], name: str) -> Gaussian:
    running: RunningGaussian | None = None
    for batch in _read(files, name):
        running = running or RunningGaussian(batch.shape[1])
        running.add(batch)
    assert running is not None
    return running.result()


def _read(files: list[Path], name: str) -> Iterator[NDArray[np.float32]]:
    for path in files:
        with open_regular(path) as stream, np.load(stream, allow_pickle=False) as file:
            yield file[name]


def _load(part: Path) -> NDArray[np.uint8]:
    with open_regular(part) as file:
        array: NDArray[np.uint8] = np.load(file, allow_pickle=False)
    return array


def write_npz(path: Path, parts: list[Path], number: int) -> None:
    """Write parts [B, H, W, 3] as one array ``arr_0``, part by part: the images are never all in memory."""
    check_regular(parts[0])
    shape = np.load(parts[0], mmap_mode="r").shape
    header = io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": (number, *shape[1:])}
    np.lib.format.write_array_header_1_0(header, description)
    with (
        durable.writing(path) as partial,
        zipfile.ZipFile(partial, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        member.write(header.getvalue())
        for part in parts:
            member.write(_load(part).tobytes())


def table(results: dict[str, Any]) -> str:
    """Return the scores as a Markdown table, with what they differ in from published ones."""
    names = {
        "fid": "FID",
        "sfid": "sFID",
        "inception_score": "IS",
        "precision": "precision",
        "recall": "recall",
    }
    row = ["ImageNet 256", *(f"{results[name]:.4g}" for name in names), str(results["images"])]
    notes = "".join(f"- {note}\n" for note in results["differences"])
    return f"{markdown_table(['', *names.values(), 'images'], [row])}\n{notes}"
