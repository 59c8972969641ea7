"""Everything that is checked before a run starts: its configuration, and what it needs of this machine or of a cluster.

Megatron-Core is not imported: these checks also take place where a job is submitted.
"""

import logging
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import torch

from rmoe_megatron.checkpoint.folders import list_checkpoints
from rmoe_megatron.checkpoint.size import checkpoint_bytes
from rmoe_megatron.config.require import require
from rmoe_megatron.config.run import Device, RunConfig, Trainable
from rmoe_megatron.config.stages import Stage, stages_of
from rmoe_megatron.config.validation import validate
from rmoe_megatron.data.loader import BatchLayout, batches
from rmoe_megatron.data.storage.store import ShardStore
from rmoe_megatron.data.training_dataset import TrainingDataset
from rmoe_megatron.engine.registry import engine_of
from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic
from rmoe_megatron.input_pipeline.settings import (
    buckets_of,
    check_shapes,
    latent_sizes,
    pixels_per_latent,
    sample_format,
)
from rmoe_megatron.input_pipeline.shard_folders import check_shards, folders_of
from rmoe_megatron.model.checks import check_model
from rmoe_megatron.model.parameters import dense_parameters, expert_parameters
from rmoe_megatron.model.precision.backend import check_backend
from rmoe_megatron.training.base_checks import check_base
from rmoe_megatron.training.benchmarks import check_benchmark
from rmoe_megatron.training.encoder_shapes import check_encoders_fit

logger = logging.getLogger(__name__)

GRADIENT_BYTES = 4  # gradients are reduced in float32
LOOKED_AT = 16  # samples of a shard that a check loads, at most
SHARDS_LOOKED_AT = 64  # of a set, at equal distances


def check(config: RunConfig, world_size: int) -> None:
    """Check a run of ``world_size`` ranks: the model, how it is trained, and what it needs of this machine.

    Raises:
        UserError: names the key, the value and what is allowed, or what is missing.
    """
    check_model(config)
    validate(config, world_size)
    check_device(config)
    engine_of(config).check(config, world_size)
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
    engine_of(config).check(config, world_size)
    check_files(config)
    check_buckets(config)
    check_evaluations(config)
    check_encoders_fit(config)
    for stage in stages_of(config):
        for folder in folders_of(config, stage):
            check_samples(config, folder, stage)


def check_device(config: RunConfig) -> None:
    """Check that the device is here.

    Raises:
        UserError: it is not.
    """
    if config.device is Device.cuda and not torch.cuda.is_available():
        raise UserError("device is cuda but PyTorch finds no GPU here; set device=cpu or device=auto.")
    check_backend(config)


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


def check_memory(config: RunConfig, bytes_per_rank: int, where: str) -> None:
    """Check that the parameters of a rank and the gradients of what is trained can fit into its memory at all.

    What is counted is less than a run needs: activations, averages and the optimizer's state come on top.

    Args:
        bytes_per_rank: memory of the device, divided by the ranks that share it.
        where: what the error message calls this memory.

    Raises:
        UserError: they cannot.
    """
    parallel = config.parallel
    dense, experts = dense_parameters(config), expert_parameters(config)
    shards = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    spread = parallel.expert_model_parallel_size * parallel.pipeline_model_parallel_size
    trains_all = config.fine_tuning is None or config.fine_tuning.trainable is Trainable.all
    has_gradients = trains_all and not engine_of(config).shards_gradients(config)
    # ZeRO's third stage shards parameters, but builds them whole first.
    bytes_each = config.precision.parameter_bytes + (GRADIENT_BYTES if has_gradients else 0)
    needed = (dense // shards + experts // spread) * bytes_each
    if needed > bytes_per_rank:
        raise UserError(
            f"The model has {dense + experts:.3g} parameters, which take at least {needed / 1e9:.4g} GB on a rank of this "
            f"layout, but {where} has {bytes_per_rank / 1e9:.4g} GB for it; choose a smaller model or a layout that spreads "
            "it over more ranks."
        )


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
    kept, every = config.checkpoint, config.checkpoint.keep_every
    milestones = config.training.steps // every if every is not None else 0
    missing = max(min(kept.keep_last + kept.keep_best + milestones + 1, saves) - there, 1)
    needed, free = missing * checkpoint_bytes(config), shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"run_dir {folder} has {free / 1e9:.4g} GB of free disk, but {missing} checkpoints of "
            f"{checkpoint_bytes(config) / 1e9:.4g} GB are to come (checkpoint.keep_last, keep_best and keep_every, and one while it is written); "
            "make room or choose another run_dir."
        )


def check_samples(config: RunConfig, folder: ShardStore, stage: Stage) -> None:
    """Look into a shard folder: load samples of its first and its last shard, and see that others begin as shards do.

    Training passes over what is damaged, with a warning, and so does this; it goes through every shard when it makes the index.

    Raises:
        UserError: a shard cannot be opened, or samples cannot be used, lack a member, or have another shape than the model takes.
    """
    shards = folder.shards()
    between = [shards[number * len(shards) // SHARDS_LOOKED_AT] for number in range(SHARDS_LOOKED_AT)]
    looked_at = dict.fromkeys(shard.name for shard in (shards[0], *between, shards[-1]))
    sound = [name for name in looked_at if _begins_as_a_shard(folder, name)]
    for name in dict.fromkeys((sound or [shards[0].name])[:: max(len(sound) - 1, 1)]):
        check_first_batch(config, folder, stage, name)


def _begins_as_a_shard(folder: ShardStore, name: str) -> bool:
    """Whether a shard begins with the header of a tar archive; warns if not."""
    with folder.open(name) as file:
        head = file.read(tarfile.BLOCKSIZE)
    try:
        tarfile.TarInfo.frombuf(head, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        logger.warning(
            "Shard %s is no tar archive, or holds nothing; training will pass over it. `rmoe data check %s REPORT` goes through all "
            "samples.", folder.path(name), folder,
        )  # fmt: skip
        return False
    return True


def check_first_batch(config: RunConfig, folder: ShardStore, stage: Stage, shard: str) -> None:
    """Load the first samples of a shard as training does, and check that they fit the model; no other shard is opened.

    Raises:
        UserError: none can be used, they lack a member, or have another shape than the model takes.
    """
    # One shard may well have no sample that the filter takes, and none of some bucket: then samples are of several sizes.
    taken = replace(sample_format(config, stage.sample_size), filter=None, divides=False)
    samples = TrainingDataset(folder, taken, shards=[shard])
    count = 1 if config.data.buckets is not None else min(stage.micro_batch_size, LOOKED_AT)
    batch = next(batches(samples, InTurn(len(samples)), BatchLayout(count, count, 0, 1), last_draw=count))
    shapes = {
        name: tuple(value.shape[1:]) for name, value in batch.items() if isinstance(value, torch.Tensor)
    }
    sizes = latent_sizes(config, stage.sample_size)
    if samples.precomputed:
        expected = next((size for size in sizes if size == shapes["latents"][1:]), sizes[0])
        check_shapes(shapes, config.model, expected, folder.path(shard), precomputed=True)
    elif samples.has_text:
        shapes["latents"] = (config.model.in_channels, *sizes[0])  # encoders and buckets see to it
        check_shapes(shapes, config.model, sizes[0], folder.path(shard), precomputed=True)


class InTurn:
    """The samples of a set one after the other, again and again."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __getitem__(self, draw: int) -> int:
        return draw % self.count


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
