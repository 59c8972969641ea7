"""Who encodes which shards, where they go, and when the set is there."""

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from safetensors.torch import save

from rmoe_megatron.config.bounds import check_bounds
from rmoe_megatron.config.require import require
from rmoe_megatron.config.run import Latents, RunConfig
from rmoe_megatron.data.shards.index import INDEX
from rmoe_megatron.distributed.device import select_device
from rmoe_megatron.distributed.launch import local_rank, rank, world_size
from rmoe_megatron.distributed.work_queue import WorkQueue
from rmoe_megatron.encoders.autoencoder import load_autoencoder
from rmoe_megatron.encoders.conditions import NULL_TEXT
from rmoe_megatron.encoders.fingerprint import DATASET, describe_autoencoder, describe_text_encoder
from rmoe_megatron.encoders.text import encode_captions, load_text_encoder
from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic
from rmoe_megatron.files.disk_errors import sentence
from rmoe_megatron.files.untrusted import read_json
from rmoe_megatron.input_pipeline.settings import buckets_of, sample_format
from rmoe_megatron.model.checks import check_model
from rmoe_megatron.precompute.captions import CaptionCache, require_storable
from rmoe_megatron.precompute.shard import DTYPES, ShardEncoder
from rmoe_megatron.precompute.sources import (
    SOURCES,
    Records,
    ShardSource,
    describe,
    link,
    read_sources,
    remove_records,
)
from rmoe_megatron.precompute.stored_captions import StoredCaptions, remove_places

logger = logging.getLogger(__name__)

CLAIMS = ".claims"  # folder of an unfinished set, one for each part
DESCRIPTION = TypeAdapter(dict[str, Any])


def precompute(
    config: RunConfig,
    source: Path,
    out: Path,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
) -> bool:
    """Encode this process's part of the shards below ``source`` into shards of the same names below ``out``.

    Several processes, one a part and one a rank of it, fill one folder whose name says that it is not finished; who finds the
    last shard there publishes it as ``out``, which appears whole or not at all. What an earlier attempt with the same
    configuration has finished is kept, also that of a finished ``out``, if its source is as it was: a shard of the source that was
    written to since is encoded anew, and ``out`` gives way to the new set when that is whole. Beside the shards ``out`` holds
    ``dataset.json`` with the encoders' fingerprints and the settings, ``sources.jsonl`` with what each shard was made of, and the
    embedding of the empty caption. For a class-conditional model only images are encoded.

    Args:
        config: its ``encoders``, ``model`` and ``device`` sections are used.
        part: which one of how many; the ranks of a job share it.
        progress: called with (shards done, shards in total) of this process.

    Returns:
        Whether ``out`` is there now.

    Raises:
        UserError: ``source`` has no shards, ``out`` holds something else, overlaps with ``source`` or cannot be written, an
            unfinished one was made with other encoders, or a shard is written to while it is encoded.
    """
    shards = check_precompute(config, source, out)
    if not shards:
        _tidy(out)
        return True
    number, count = part[0] * world_size() + rank(), part[1] * world_size()
    names = [str(shard.relative_to(source)) for shard in shards]
    mine, unfinished = names[number::count], atomic.unfinished(out)
    finished = _claim(config, source, out)
    if not check_precompute(config, source, out):  # another process has given the folder its name in between
        atomic.remove(unfinished)
        return True
    records = Records(unfinished, source)
    there = {
        name
        for name in mine
        if records.is_current(name) or (name in finished and records.take_over(out, finished[name]))
    }
    outdated = {name: records.get(name) for name in mine}

    def is_done(index: int) -> bool:
        name = mine[index]
        if name not in there and (
            records.get(name) not in (None, outdated[name]) or (not unfinished.is_dir() and out.is_dir())
        ):
            there.add(name)
        return name in there

    encoder: ShardEncoder | None = None
    # Processes that were given the same part share it.
    queue = WorkQueue(unfinished / f"{CLAIMS}-{number}-{count}", len(mine), is_done)
    for index in queue.take(progress):
        if encoder is None:  # who has nothing left to do loads nothing
            encoder = _load_encoder(config, unfinished)
        _encode(encoder, source / mine[index], unfinished / mine[index], records)
    return _publish(records, out, names, finished)


def _encode(encoder: ShardEncoder, shard: Path, target: Path, records: Records) -> None:
    """Encode a shard, and say what it was made of.

    Raises:
        UserError: it was written to meanwhile.
    """
    name = str(shard.relative_to(records.source))
    records.forget(name)
    described = describe(records.source, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic.writing(target) as partial:
        places = encoder.encode(shard, partial)
    if not described.is_untouched(shard):
        raise UserError(
            f"The shard {shard} was written to while it was encoded; precompute it again when it is complete."
        )
    if encoder.captions is not None and encoder.captions.stored is not None and places:
        encoder.captions.stored.put(
            name, places
        )  # before the record, with the last of which the set gets another name
    records.put(described)


def _load_encoder(config: RunConfig, unfinished: Path) -> ShardEncoder:
    """Load the frozen encoders, and have the empty caption's embedding beside the shards."""
    device, asked = select_device(config.device, local_rank()), config.data.precompute
    captions = autoencoder = None
    if not config.model.is_class_conditional:
        text_encoder = load_text_encoder(
            config.encoders, config.model.text_length, device, config.model.text_hidden_size
        )
        captions = CaptionCache(text_encoder, DTYPES[asked.storage], StoredCaptions(unfinished))
        if not (unfinished / NULL_TEXT).exists():
            null_text = encode_captions(text_encoder, [""])
            tensors = {"text_hidden_states": null_text.hidden_states, "text_pooled": null_text.pooled}
            require_storable(tensors.items(), "The empty caption")
            with atomic.writing(unfinished / NULL_TEXT) as partial:
                partial.write_bytes(save(tensors))
    if asked.latents is not Latents.none:
        autoencoder = load_autoencoder(config.encoders.autoencoder, device)
    return ShardEncoder(captions, autoencoder, sample_format(config), asked)


def check_precompute(config: RunConfig, source: Path, out: Path) -> list[Path]:
    """Check where shards come from and go to; returns those that are to be encoded, in the order of their names.

    The list is empty if ``out`` already holds what would be made; asking for a finished part again is no error.

    Raises:
        UserError: see :func:`precompute`.
    """
    check_model(config)
    check_bounds(config.data)
    latents = config.data.precompute.latents
    require(
        latents is not Latents.none or not config.model.is_class_conditional,
        "data.precompute.latents=none encodes texts alone, and a class-conditional model has none; leave it out.",
    )
    require(
        latents is not Latents.distribution or config.encoders.autoencoder != "pixel",
        "data.precompute.latents=distribution needs an autoencoder whose latents are drawn from one, and pixels are themselves; leave "
        "it out.",
    )
    require(
        not (config.data.augment.flips or config.data.augment.crops),
        "data.augment changes raw samples in every draw of training, which precomputed ones do not; leave it out (data.precompute.crops and "
        "data.precompute.flips make samples of parts and mirrored pictures).",
    )
    inner, outer = out.resolve(), source.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise UserError(f"{out} and {source} overlap; choose an output folder apart from the source.")
    shards = sorted(source.rglob("*.tar"))
    if not shards:
        raise UserError(f"There are no .tar shards in or below {source}; build or download the data first.")
    if not _is_of(config, source, out):
        atomic.require_empty(out, "The output")
        return shards
    sources = read_sources(out)
    names = [str(shard.relative_to(source)) for shard in shards]
    is_current = sources.keys() == set(names) and all(
        (out / name).is_file() and sources[name].is_untouched(source / name) for name in names
    )
    return [] if is_current else shards


def _is_of(config: RunConfig, source: Path, out: Path) -> bool:
    """Whether a finished set lies at ``out``.

    Raises:
        UserError: one of other encoders or settings, or of another source.
    """
    if not (out / DATASET).is_file() or not (out / SOURCES).is_file():
        return False
    if read_json(out / DATASET, DESCRIPTION) != _description(config, source):
        raise UserError(
            f"{out} holds a set that was precomputed with other encoders or settings, or of another source, as its {DATASET} says; "
            "choose another output, or remove it first."
        )
    return True


def _claim(config: RunConfig, source: Path, out: Path) -> dict[str, ShardSource]:
    """Make the unfinished folder, or find that it was made for the same: its ``dataset.json`` says for what.

    Returns:
        What the shards of a finished set at ``out`` were made of; those whose source is as it was need not be encoded again.
    """
    unfinished = atomic.unfinished(out)
    if not unfinished.exists():
        with suppress(FileNotFoundError):  # what a process was about to publish that was killed
            _ready(out).rename(unfinished)
    unfinished.mkdir(parents=True, exist_ok=True)
    description = _description(config, source)
    path = unfinished / DATASET
    if not path.exists():
        with atomic.writing(path) as partial:
            partial.write_text(json.dumps(description, indent=1) + "\n")
    if read_json(path, DESCRIPTION) != description:
        raise UserError(
            f"{unfinished} holds shards of an unfinished precomputation with other encoders or of another source; remove it "
            "or choose another output."
        )
    if not _is_of(config, source, out):
        return {}
    if (out / NULL_TEXT).is_file():
        link(out / NULL_TEXT, unfinished / NULL_TEXT)
    return read_sources(out)


def _publish(records: Records, out: Path, names: list[str], finished: dict[str, ShardSource]) -> bool:
    """Give the folder its name if all shards are there and the source is as it was for each; another process may do so, too.

    Args:
        finished: what the shards of the set at ``out`` were made of, which gives way.
    """
    unfinished = records.folder
    try:
        if not all(records.get(name) is not None for name in names):
            return not unfinished.is_dir() and (out / SOURCES).is_file()
        if outdated := records.outdated(names):
            logger.warning(
                "%s is not finished: %s%s changed in %s after it was encoded; run all parts again, what has not changed is kept.",
                out, outdated[0], f" and {len(outdated) - 1} more" if len(outdated) > 1 else "", records.source,
            )  # fmt: skip
            return False
        for leftover in unfinished.rglob("*.partial"):
            if atomic.is_being_written(leftover):
                return False  # by a process that shares the work otherwise, and gives the folder its name when it is done
            leftover.unlink(missing_ok=True)
        if gone := finished.keys() - set(names):
            logger.warning(
                "%s no longer has what was made of %d shards that %s no longer has.",
                out,
                len(gone),
                records.source,
            )
        if finished:
            _keep_beside(out, unfinished, {*names, *finished})
        records.finish(names)
        for folder in {unfinished, *((unfinished / name).parent for name in names)}:
            atomic.sync(folder)
        ready = _ready(out)
        unfinished.rename(ready)  # of several processes one does; the others no longer reach it
        for claims in ready.glob(f"{CLAIMS}-*"):  # of processes that were killed, or have just come
            atomic.remove(claims)
        remove_places(ready)
        atomic.put_in_place(ready, out, replace=bool(finished))
    except FileNotFoundError:
        return True
    _tidy(out)
    return True


def _tidy(out: Path) -> None:
    """Remove the records of single shards from a finished set; what cannot be removed now is when the set is asked for again."""
    try:
        remove_records(out)
    except OSError as error:
        logger.warning("Records that %s no longer needs stay in it for now: %s", out, sentence(error))


def _ready(out: Path) -> Path:
    """Return the name of a set that is whole and about to take its place."""
    return out.with_name(f".{out.name}.ready.partial")


def _keep_beside(out: Path, unfinished: Path, made: set[str]) -> None:
    """Take over what others have put into a finished set; indices of its shards are made again."""
    for path in out.rglob("*"):
        name = path.relative_to(out)
        is_own = str(name) in {*made, DATASET, SOURCES, NULL_TEXT} or name.name.startswith(INDEX)
        if path.is_file() and not is_own and not (unfinished / name).exists():
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            link(path, unfinished / name)


def _description(config: RunConfig, source: Path) -> dict[str, Any]:
    """Return the ``dataset.json`` to be: that of the source, and which encoders make the embeddings."""
    path = source / DATASET
    description: dict[str, Any] = {"name": source.name}
    if path.exists():
        description = read_json(path, DESCRIPTION)
    asked = config.data.precompute
    described = describe_autoencoder(config.encoders.autoencoder) if asked.latents is not Latents.none else {}
    if not config.model.is_class_conditional:
        described |= describe_text_encoder(config)
    samples = {
        "captions": config.data.captions,
        "upscale": config.data.upscale,
        "filter": config.data.filter,
        "latents": asked.latents.value,
        "storage": asked.storage.value,
        "crops": asked.crops,
        "flips": asked.flips,
    }
    if asked.latents is not Latents.none:
        samples["sizes"] = list(map(str, buckets_of(config, config.model.sample_size)))
        samples["buckets"] = config.data.buckets is not None
    if config.data.captions != ["txt"]:
        samples["seed"] = config.seed  # which of several captions is taken depends on it
    return description | {"encoders": described, "samples": samples}
