"""ImageNet-256 from classes to scores: images and features in parts, by all ranks, summed up by rank 0."""

import functools
import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rmoe_megatron.distributed.device import inference_device
from rmoe_megatron.distributed.launch import is_main_process, local_rank, rank
from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.imagenet.dit_sampling import (
    GUIDED_CHANNELS,
    Mode,
    published_sampler,
    require_class_conditional,
)
from rmoe_megatron.evaluation.imagenet.dit_sampling import sample as sample_as_dit
from rmoe_megatron.evaluation.imagenet.features import WEIGHTS, WEIGHTS_SHA256, Features, Inception
from rmoe_megatron.evaluation.imagenet.given_samples import FolderOfSamples, open_given
from rmoe_megatron.evaluation.imagenet.metrics import (
    Gaussian,
    RunningGaussian,
    frechet_distance,
    inception_score,
    precision_and_recall,
)
from rmoe_megatron.evaluation.imagenet.reference import Reference, StoredImages, open_reference
from rmoe_megatron.evaluation.results import markdown_table, write_results
from rmoe_megatron.evaluation.rule_set import RuleSet
from rmoe_megatron.evaluation.workspace import check_out
from rmoe_megatron.files import atomic
from rmoe_megatron.files.images import labelled_grid, png
from rmoe_megatron.files.regular import check_regular, open_regular
from rmoe_megatron.inference.fingerprints import file_digest
from rmoe_megatron.inference.generation import (
    Progress,
    Sampling,
    build_pipeline,
    fill,
    image_seed,
    sampling_record,
)
from rmoe_megatron.inference.provenance import Product, Record, digest
from rmoe_megatron.inference.sampling import describe_place, sample_images
from rmoe_megatron.pretrained.architecture import read_architecture
from rmoe_megatron.versions import INFERENCE, versions_of

NUM_IMAGES, NUM_CLASSES = 50_000, 1000  # of FID-50K
PUBLISHED_CHANNELS = 4  # of the latents of the published models
QUIRKS = [
    "precision and recall are taken from squared distances in float16, in which near neighbours are equally far: both are larger"
]
REFERENCE_PART = 500  # images of the reference whose features are computed together
SHOWN = 64  # images of the grid

Extract = Callable[[NDArray[np.uint8]], Features]


@dataclass(frozen=True)
class Settings:
    """How many images of which classes, and what they are compared with.

    ``num_images`` is 50,000 by default, and for samples that are given as many as there are. ``balanced`` takes the classes in turn;
    else they are drawn from the seed, which is the default of the mode ``dit``. ``allow_incomplete`` takes samples that are more or
    fewer than they should be.
    """

    out: Path
    reference: Path
    inception: Path
    num_images: int | None = None
    num_classes: int = NUM_CLASSES
    balanced: bool | None = None
    again: bool = False  # make anew what was made by another command, which is refused otherwise
    mode: Mode = Mode.dit
    protocol: RuleSet = RuleSet.official
    allow_incomplete: bool = False

    @property
    def takes_turns(self) -> bool:
        """Whether the classes are taken in turn."""
        return self.mode is Mode.pipeline if self.balanced is None else self.balanced


Given = FolderOfSamples | StoredImages


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
    out, given = settings.out, open_given(Path(sampling.model))
    reference = open_reference(settings.reference)
    if extract is None and not settings.inception.is_file():
        raise UserError(
            f"There is no file {settings.inception} (--inception); get torch-fidelity's {WEIGHTS}."
        )
    asked = settings.num_images
    settings = replace(settings, num_images=_number_of_images(given, sampling, settings))
    classes = class_labels(settings, sampling.seed)
    if given is None:
        _check_classes(sampling, settings)
        sampler = (
            published_sampler(Path(sampling.model), sampling.scheduler) if settings.mode is Mode.dit else None
        )
        made = sampling_record(sampling, sampler) | {"mode": settings.mode.value}
        if settings.mode is Mode.dit:
            made["guided_channels"] = GUIDED_CHANNELS
    else:
        made = {"images": digest(given.digests(0, len(classes)))}
    judge = _judge_record(settings, extract)
    identity: Record = {
        "benchmark": "ImageNet 256",
        "protocol": settings.protocol.value,
        "classes": "given" if given is not None else "balanced" if settings.takes_turns else "random",
        "class_labels": {"number": len(classes), "sha256": digest(classes.tolist())},
        "sampling": made,
        "judge": judge,
    }
    parts = _part_products(out / "parts", classes, sampling, made, given)
    features, of_reference = _feature_products(out, parts, reference, judge)
    check_out(out, [*parts, *features, *of_reference], identity, settings.again)
    device = inference_device(local_rank())
    extractor = extract or Inception(settings.inception, device)  # before an image is made
    _make_parts(parts, classes, sampling, settings, given, progress("sample"))
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
        write_npz(out / "samples.npz", paths, len(classes))
        results = identity | {
            "model": str(Path(sampling.model).absolute()),
            "reference": str(settings.reference),
            "extractor": "torch-fidelity's Inception v3 with TensorFlow's weights of 2015-12-05",
            "quirks": QUIRKS if settings.protocol is RuleSet.official else [],
            "differences": _differences(sampling, settings, judge, given),
            **_incomplete(given, asked),
            **compare(_paths(features), _paths(of_reference), reference, device, settings.protocol),
        }
        write_results(out, results, table(results), [])
        shown = _load(paths[0])[:SHOWN]
        names = [str(each) for each in (classes if given is None else np.arange(len(shown)))[: len(shown)]]
        atomic.write(out / "gallery.png", png(labelled_grid(shown, names)))


def _paths(products: list[Product]) -> list[Path]:
    return [product.path for product in products]


def _number_of_images(given: Given | None, sampling: Sampling, settings: Settings) -> int:
    """Return how many images are scored: as asked for, or as many as are given.

    Raises:
        UserError: the samples that are given are not as many as asked for.
    """
    if given is None:
        return settings.num_images or NUM_IMAGES
    asked = settings.num_images or given.count
    if given.count != asked and not settings.allow_incomplete:
        few = "fewer" if given.count < asked else "more"
        raise UserError(
            f"{sampling.model} holds {given.count} images, {few} than --num-images {asked}; give their number, or --allow-incomplete to "
            "score the first of them, which the result then says."
        )
    return min(asked, given.count)


def _check_classes(sampling: Sampling, settings: Settings) -> None:
    classes = require_class_conditional(Path(sampling.model))
    if classes < settings.num_classes:
        raise UserError(
            f"{sampling.model} draws {classes} classes, but ImageNet has {settings.num_classes}; score a model of its classes."
        )


def _incomplete(given: Given | None, asked: int | None) -> Record:
    """Return how many samples were given and asked for, where that is not the same."""
    if given is None or asked in (None, given.count):
        return {}
    return {"incomplete": {"given": given.count, "asked": asked}}


def _differences(sampling: Sampling, settings: Settings, judge: Record, given: Given | None) -> list[str]:
    """Return in what a result differs from published ones."""
    differences = []
    if settings.num_images != NUM_IMAGES:
        differences.append(f"{settings.num_images} images: not FID-50K")
    if given is not None and given.count != settings.num_images:
        differences.append(f"the first {settings.num_images} of {given.count} images")
    if not str(judge["extractor"]).startswith(WEIGHTS_SHA256):
        differences.append(
            f"features of {settings.inception.name}, not of torch-fidelity's published weights"
        )
    if given is not None:
        return differences
    if settings.mode is Mode.pipeline:
        differences.append("sampled by the folder's pipeline, not by DiT's protocol")
        return differences
    if settings.takes_turns:
        differences.append("classes in turn, which DiT's protocol draws")
    if sampling.scheduler is not None:
        differences.append(f"sampled by {sampling.scheduler}")
    channels = read_architecture(Path(sampling.model) / "transformer", text_length=1).model.in_channels
    if channels != PUBLISHED_CHANNELS:
        differences.append(f"guidance moves the first {GUIDED_CHANNELS} of {channels} channels, not of four")
    return differences


def class_labels(settings: Settings, seed: int) -> NDArray[np.int64]:
    """Return the class of every image."""
    number = settings.num_images or NUM_IMAGES
    if settings.takes_turns:
        return np.arange(number) % settings.num_classes
    return np.random.default_rng([seed, number]).integers(0, settings.num_classes, number)


def _part_products(
    folder: Path, classes: NDArray[np.int64], sampling: Sampling, record: Record, given: Given | None
) -> list[Product]:
    """Return the files of the images, a batch in each."""

    def of_part(start: int) -> Record:
        numbers = range(start, min(start + sampling.batch_size, len(classes)))
        if given is not None:
            return {"images": given.digests(numbers.start, numbers.stop)}
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
    settings: Settings,
    given: Given | None,
    progress: Progress | None,
) -> None:
    sample = functools.cache(lambda: _sampler(sampling, settings))

    def images(number: int) -> bytes:
        indices = range(number * sampling.batch_size, min((number + 1) * sampling.batch_size, len(classes)))
        if given is not None:
            made = given.images(indices.start, indices.stop)
        else:
            seeds = [image_seed(sampling.seed, index, 0) for index in indices]
            made = sample()([int(classes[index]) for index in indices], seeds)
        buffer = io.BytesIO()
        np.save(buffer, made)
        return buffer.getvalue()

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(min(done * sampling.batch_size, len(classes)), len(classes))

    if given is None and is_main_process() and not all(part.is_made for part in parts):
        print(f"images are made {describe_place(sampling.dtype)}")
    fill(parts, settings.out / "claims" / "parts", images, report)


def _sampler(sampling: Sampling, settings: Settings) -> Callable[[list[int], list[int]], NDArray[np.uint8]]:
    """Load the model; returns a function of classes and seeds to images."""
    pipeline = build_pipeline(sampling)
    arguments = sampling.steps, sampling.guidance
    if settings.mode is Mode.dit:
        pipeline.scheduler = published_sampler(Path(sampling.model), sampling.scheduler)
        return lambda classes, seeds: sample_as_dit(
            pipeline, classes, seeds, *arguments, sampling.guidance_interval
        )
    return lambda classes, seeds: sample_images(
        pipeline, list(map(str, classes)), seeds, *arguments, sampling.batch_size,
        guidance_interval=sampling.guidance_interval,
    )  # fmt: skip


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


def compare(
    features: list[Path],
    of_reference: list[Path],
    reference: Reference,
    device: torch.device,
    protocol: RuleSet = RuleSet.official,
) -> dict[str, float | int]:
    """Return the scores of samples against a reference, from files of features read one by one."""
    pool, spatial = _gaussian(features, "pool"), _gaussian(features, "spatial")
    real_pool = reference.pool or _gaussian(of_reference, "pool")
    real_spatial = reference.spatial or _gaussian(of_reference, "spatial")
    samples, real = (np.concatenate(list(_read(files, "pool"))) for files in (features, of_reference))
    precision, recall = precision_and_recall(real, samples, device, half=protocol is RuleSet.official)
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
        atomic.writing(path) as partial,
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
