"""Everything that is checked before a run starts: its configuration, and what it needs of this machine or of a cluster.

Megatron-Core is not imported: these checks also take place where a job is submitted.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated, TypedDict

import torch
from pydantic import Field, TypeAdapter, with_config

from rmoe_megatron.checkpoint.folders import list_checkpoints
from rmoe_megatron.config.buckets import Bucket, build_buckets
from rmoe_megatron.config.captions import parse_captions
from rmoe_megatron.config.model import ModelConfig
from rmoe_megatron.config.require import require
from rmoe_megatron.config.run import Device, OptimizerName, RunConfig, Trainable
from rmoe_megatron.config.sample_filter import SampleFilter
from rmoe_megatron.config.stages import Stage, stages_of
from rmoe_megatron.config.validation import validate
from rmoe_megatron.data.loader import BatchLayout, batches
from rmoe_megatron.data.shards.bucketing import Bucketing
from rmoe_megatron.data.storage.block_cache import BlockCache
from rmoe_megatron.data.storage.remote_store import shard_store
from rmoe_megatron.data.storage.store import ShardStore
from rmoe_megatron.data.training_dataset import SampleFormat, TrainingDataset
from rmoe_megatron.engine.deepspeed.library import check_deepspeed
from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic
from rmoe_megatron.files.untrusted import OPEN, read_json
from rmoe_megatron.model.checks import check_model
from rmoe_megatron.model.parameters import dense_parameters, module_parameters
from rmoe_megatron.model.precision.backend import check_backend, is_installed
from rmoe_megatron.pretrained.hub import present_folder
from rmoe_megatron.pretrained.model_files import autoencoder_parts
from rmoe_megatron.training.base_checks import check_base
from rmoe_megatron.training.benchmarks import check_benchmark
from rmoe_megatron.training.encoder_shapes import check_encoders_fit


@with_config(OPEN)
class AutoencoderConfig(TypedDict):
    """What of an AutoencoderKL's ``config.json`` is needed: channels of its blocks, each but the last halves the side."""

    block_out_channels: Annotated[list[int], Field(min_length=1, max_length=16)]


AUTOENCODER = TypeAdapter(AutoencoderConfig)
# Of an average, a main parameter and Adam's two moments, in float32.
STATE_BYTES = 4 * 4
LOOKED_AT = 16  # samples of a set that a check loads, at most


def check(config: RunConfig, world_size: int) -> None:
    """Check a run of ``world_size`` ranks: the model, how it is trained, and what it needs of this machine.

    Raises:
        UserError: names the key, the value and what is allowed, or what is missing.
    """
    check_model(config)
    validate(config, world_size)
    check_device(config)
    check_deepspeed(config, world_size)
    check_muon(config)
    check_files(config)
    check_buckets(config)
    check_evaluations(config)


def check_looking(config: RunConfig) -> None:
    """Check what it takes to look at a run's model and training samples on one rank, where nothing of the run is written.

    Raises:
        UserError: names the key, the value and what is allowed, or what is missing.
    """
    check_model(config)
    validate(config, world_size=1)
    check_device(config)
    check_shards(config)
    check_buckets(config)


def check_submission(config: RunConfig, world_size: int) -> None:
    """Check that a run can start that will take place elsewhere, with the same files: all but what needs its device.

    A batch of every data set, training's and validation's, is loaded and compared with the model; so is what the frozen encoders give,
    which must be here: compute nodes download nothing.

    Raises:
        UserError: names the key, the value and what is allowed, or what is missing.
    """
    check_model(config)
    validate(config, world_size)
    check_deepspeed(config, world_size)
    check_muon(config)
    check_files(config)
    check_buckets(config)
    check_evaluations(config)
    check_encoders_fit(config)
    for stage in stages_of(config):
        for folder in folders_of(config, stage):
            check_first_batch(config, folder, stage)


def check_device(config: RunConfig) -> None:
    """Check that the device is here.

    Raises:
        UserError: it is not.
    """
    if config.device is Device.cuda and not torch.cuda.is_available():
        raise UserError("device is cuda but PyTorch finds no GPU here; set device=cpu or device=auto.")
    check_backend(config)


def check_muon(config: RunConfig) -> None:
    """Check that the package that has Muon's arithmetic is here, which Megatron-Core does not ask for.

    Raises:
        ModuleNotFoundError: it is not; the command line says which extra brings it.
    """
    if config.optimizer.name is OptimizerName.muon and not is_installed("emerging_optimizers"):
        raise ModuleNotFoundError("No module named 'emerging_optimizers'", name="emerging_optimizers")


def check_files(config: RunConfig) -> None:
    """Check that the files a validated configuration names are there, and that its checkpoints will have room.

    Raises:
        UserError: names the key and what is missing or cannot be written.
    """
    if config.fine_tuning is not None:
        check_base(config)
    check_shards(config)
    atomic.check_writable(Path(config.run_dir), "run_dir")
    if config.data.cache is not None:
        atomic.check_writable(Path(config.data.cache), "data.cache")
    check_space(config)


def check_shards(config: RunConfig) -> None:
    """Check that the shard folders of every stage are there.

    Raises:
        UserError: one is not, or has no shards.
    """
    for stage in stages_of(config):
        for folder in folders_of(config, stage):
            folder.shards()


def checkpoint_bytes(config: RunConfig) -> int:
    """Return what a checkpoint takes: weights, and of what is trained their average, main parameters and moments.

    With ``fine_tuning.trainable=added`` it is of the additions alone; with ``blocks`` an upper bound.
    """
    dense, modules = dense_parameters(config), module_parameters(config)
    if config.fine_tuning is not None and config.fine_tuning.trainable is Trainable.added:
        dense = (
            0  # the gate, the modulation and LoRA are small beside the modules, or there is nothing larger
        )
    return (dense + modules) * (STATE_BYTES + config.precision.parameter_bytes)


def check_space(config: RunConfig) -> None:
    """Check that the disk of ``run_dir`` can take the checkpoints that are kept and the one that is being written.

    Raises:
        UserError: it cannot.
    """
    folder = existing = Path(config.run_dir)
    while not existing.exists():
        existing = existing.parent
    saves = -(-config.training.steps // config.checkpoint.every)
    there = len(list_checkpoints(folder))
    missing = max(min(config.checkpoint.keep_last + 1, saves) - there, 1)
    needed, free = missing * checkpoint_bytes(config), shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"run_dir {folder} has {free / 1e9:.4g} GB of free disk, but {missing} checkpoints of "
            f"{checkpoint_bytes(config) / 1e9:.4g} GB are to come (checkpoint.keep_last, and one while it is written); "
            "make room or choose another run_dir."
        )


def pixels_per_latent(autoencoder: str) -> int:
    """Return how many pixels of an image's side one of its latents' stands for.

    Raises:
        UserError: the autoencoder is not here, or its configuration cannot be read.
    """
    if autoencoder == "pixel":
        return 1
    folder = present_folder(autoencoder, "encoders.autoencoder", autoencoder_parts)
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    described = read_json(folder / "config.json", AUTOENCODER)
    return 2 ** (len(described["block_out_channels"]) - 1)


def folders_of(config: RunConfig, stage: Stage) -> list[ShardStore]:
    """Return the shard folders of a stage."""
    names = [*(dataset.path for dataset in stage.datasets), *filter(None, [stage.validation])]
    return [store_of(config, name) for name in names]


def store_of(config: RunConfig, location: str) -> ShardStore:
    """Return the store of a folder or URL; what is remote goes through the run's cache."""
    data, cache = config.data, None
    if data.cache is not None:
        cache = BlockCache(Path(data.cache), int(data.cache_gigabytes * 1e9))
    return shard_store(location, cache)


def check_first_batch(config: RunConfig, folder: ShardStore, stage: Stage) -> None:
    """Load the first samples of a shard folder as training does, and check that they fit the model; no other shard is opened.

    Raises:
        UserError: none can be used, they lack a member, or have another shape than the model takes.
    """
    # One shard may well have no sample that the filter takes, and none of some bucket: then samples are of several sizes.
    taken = replace(sample_format(config, stage.sample_size), filter=None, divides=False)
    samples = TrainingDataset(folder, taken, shards=[folder.shards()[0].name])
    count = 1 if config.data.buckets is not None else min(stage.micro_batch_size, LOOKED_AT)
    batch = next(batches(samples, InTurn(len(samples)), BatchLayout(count, count, 0, 1), last_draw=count))
    shapes = {
        name: tuple(value.shape[1:]) for name, value in batch.items() if isinstance(value, torch.Tensor)
    }
    sizes = latent_sizes(config, stage.sample_size)
    if samples.precomputed:
        expected = next((size for size in sizes if size == shapes["latents"][1:]), sizes[0])
        check_shapes(shapes, config.model, expected, str(folder), precomputed=True)
    elif samples.has_text:
        shapes["latents"] = (config.model.in_channels, *sizes[0])  # encoders and buckets see to it
        check_shapes(shapes, config.model, sizes[0], str(folder), precomputed=True)


class InTurn:
    """The samples of a set one after the other, again and again."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __getitem__(self, draw: int) -> int:
        return draw % self.count


def buckets_of(config: RunConfig, sample_size: int) -> tuple[Bucket, ...]:
    """Return the sizes of a run's pictures, in pixels: its buckets, or one square.

    Args:
        sample_size: of a side of the square latents.

    Raises:
        UserError: a bucket is none, or the autoencoder is not here, or its configuration cannot be read.
    """
    side = sample_size * pixels_per_latent(config.encoders.autoencoder)
    if config.data.buckets is None:
        return (Bucket(side, side),)
    return build_buckets(config.data.buckets, side)


def latent_sizes(config: RunConfig, sample_size: int) -> list[tuple[int, int]]:
    """Return height and width of the latents of each bucket."""
    scale = pixels_per_latent(config.encoders.autoencoder)
    return [(bucket.height // scale, bucket.width // scale) for bucket in buckets_of(config, sample_size)]


def check_evaluations(config: RunConfig) -> None:
    """Check that the benchmarks between steps have their prompts and judges here, and judge pictures of the model's size.

    Raises:
        UserError: something is missing, or the pictures are of another size.
    """
    side = config.model.sample_size * pixels_per_latent(config.encoders.autoencoder)
    for number, settings in enumerate(config.training.evaluations):
        check_benchmark(settings, side, f"training.evaluations[{number}]")


def check_buckets(config: RunConfig) -> None:
    """Check that the model takes latents of every bucket of every stage, spread over ranks as configured.

    Raises:
        UserError: a bucket does not fit.
    """
    model, parallel = config.model, config.parallel
    if config.data.buckets is None:
        return
    shards = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    unit = pixels_per_latent(config.encoders.autoencoder) * model.patch_size
    for stage in stages_of(config):
        for bucket in buckets_of(config, stage.sample_size):
            width, height = bucket.width // unit, bucket.height // unit
            require(
                bucket.width % unit == 0 and bucket.height % unit == 0,
                f"data.buckets has {bucket}, whose sides must be multiples of {unit} pixels, those of a patch; change sizes or "
                "multiple.",
            )
            require(
                max(width, height) <= model.pos_embed_max_size,
                f"data.buckets has {bucket}, which is {width} x {height} patches; model.pos_embed_max_size "
                f"({model.pos_embed_max_size}) is the most of a side: lower max_aspect_ratio, or raise it.",
            )
            require(
                width * height % shards == 0,
                f"data.buckets has {bucket}, whose {width * height} patches cannot be spread over tensor_model_parallel_size x "
                f"context_parallel_size = {shards} ranks; raise data.buckets.multiple, or choose other sizes.",
            )


def sample_format(config: RunConfig, sample_size: int | None = None) -> SampleFormat:
    """Return what the model of a configuration takes of samples.

    Args:
        sample_size: of a side of the square latents, if it is not the model's.

    Raises:
        UserError: the autoencoder is not here, or its configuration cannot be read.
    """
    buckets = buckets_of(config, sample_size or config.model.sample_size)
    return SampleFormat(
        config.model.num_classes,
        Bucketing(buckets, config.data.upscale),
        config.data.buckets is not None,
        pixels_per_latent(config.encoders.autoencoder),
        parse_captions(config.data.captions),
        config.seed,
        SampleFilter(config.data.filter) if config.data.filter is not None else None,
        config.data.augment,
    )


def check_shapes(
    shapes: dict[str, tuple[int, ...]],
    model: ModelConfig,
    size: tuple[int, int],
    folder: str,
    precomputed: bool,
) -> None:
    """Check the shapes of a sample, encoded, against what a model takes.

    Args:
        size: height and width of the latents.
        folder: of the sample.
        precomputed: it lies there encoded.

    Raises:
        UserError: one differs.
    """
    expected: dict[str, tuple[int, ...]] = {"latents": (model.in_channels, *size)}
    if not model.is_class_conditional:
        expected["text_hidden_states"] = (model.text_length, model.text_hidden_size)
        expected["text_pooled"] = (model.pooled_size,)
    remedy = "precompute the data again with" if precomputed else "use data and encoders that fit"
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise UserError(
                f"{name} from {folder} has shape {shapes[name]} but the model of this configuration needs {shape}; "
                f"{remedy} this configuration."
            )
