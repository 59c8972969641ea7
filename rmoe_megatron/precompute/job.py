"""Who encodes which shards, where they go, and when the set is there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from safetensors.torch import save

from rmoe_megatron import durable
from rmoe_megatron.config.bounds import check_bounds
from rmoe_megatron.config.requirements import require
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.encoders.autoencoder import load_autoencoder
from rmoe_megatron.encoders.conditions import NULL_TEXT
from rmoe_megatron.encoders.fingerprint import DATASET, describe_autoencoder, describe_text_encoder
from rmoe_megatron.encoders.text import encode_captions, load_text_encoder
from rmoe_megatron.errors import UserError
from rmoe_megatron.launch import local_rank, rank, world_size
from rmoe_megatron.model.checks import check_model
from rmoe_megatron.platform import select_device
from rmoe_megatron.precompute.captions import CaptionCache
from rmoe_megatron.precompute.shard import DTYPES, ShardEncoder
from rmoe_megatron.training.preflight import buckets_of, sample_format
from rmoe_megatron.typed_files import read_json

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
    configuration has finished is kept. Beside the shards ``out`` holds ``dataset.json`` with the encoders' fingerprints and
    the embedding of the empty caption. For a class-conditional model only images are encoded.

    Args:
        config: its ``encoders``, ``model`` and ``device`` sections are used.
        part: which one of how many; the ranks of a job share it.
        progress: called with (shards done, shards in total) of this process.

    Returns:
        Whether ``out`` is there now.

    Raises:
        UserError: ``source`` has no shards, ``out`` is not empty, overlaps with ``source`` or cannot be written, or an
            unfinished one was made with other encoders.
    """
    shards = check_precompute(config, source, out)
    if not shards:
        return True
    mine = shards[part[0] * world_size() + rank() :: part[1] * world_size()]
    unfinished = durable.unfinished(out)
    _claim(config, source, unfinished)
    encoder: ShardEncoder | None = None
    for done, shard in enumerate(mine):
        target = unfinished / shard.relative_to(source)
        if not target.exists():
            if encoder is None:  # who has nothing left to do loads nothing
                encoder = _load_encoder(config, unfinished)
            target.parent.mkdir(parents=True, exist_ok=True)
            with durable.writing(target) as partial:
                encoder.encode(shard, partial)
        if progress is not None:
            progress(done + 1, len(mine))
    return _publish(unfinished, out, [shard.relative_to(source) for shard in shards])


def _load_encoder(config: RunConfig, unfinished: Path) -> ShardEncoder:
    """Load the frozen encoders, and have the empty caption's embedding beside the shards."""
    device, asked = select_device(config.device, local_rank()), config.data.precompute
    captions = autoencoder = None
    if not config.model.is_class_conditional:
        text_encoder = load_text_encoder(config.encoders, config.model.text_length, device)
        captions = CaptionCache(text_encoder, DTYPES[asked.storage])
        if not (unfinished / NULL_TEXT).exists():
            null_text = encode_captions(text_encoder, [""])
            tensors = {"text_hidden_states": null_text.hidden_states, "text_pooled": null_text.pooled}
            with durable.writing(unfinished / NULL_TEXT) as partial:
                partial.write_bytes(save(tensors))
    if asked.latents:
        autoencoder = load_autoencoder(config.encoders.autoencoder, device)
    return ShardEncoder(captions, autoencoder, sample_format(config), asked)


def check_precompute(config: RunConfig, source: Path, out: Path) -> list[Path]:
    """Check where shards come from and go to; returns those that are to be encoded, in the order of their names.

    None are if ``out`` is the finished work of the same configuration: a part of it may be asked for again.

    Raises:
        UserError: see :func:`precompute`.
    """
    check_model(config)
    check_bounds(config.data)
    require(
        config.data.precompute.latents or not config.model.is_class_conditional,
        "data.precompute.latents=false encodes texts alone, and a class-conditional model has none; leave it out.",
    )
    inner, outer = out.resolve(), source.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise UserError(f"{out} and {source} overlap; choose an output folder apart from the source.")
    shards = sorted(source.rglob("*.tar"))
    if not shards:
        raise UserError(f"There are no .tar shards in or below {source}; build or download the data first.")
    is_there = (out / DATASET).is_file() and all(
        (out / shard.relative_to(source)).is_file() for shard in shards
    )
    if is_there and read_json(out / DATASET, DESCRIPTION) == _description(config, source):
        return []
    durable.require_empty(out, "The output")
    return shards


def _claim(config: RunConfig, source: Path, unfinished: Path) -> None:
    """Make the unfinished folder, or find that it was made for the same: its ``dataset.json`` says for what."""
    unfinished.mkdir(parents=True, exist_ok=True)
    description = _description(config, source)
    path = unfinished / DATASET
    if not path.exists():
        with durable.writing(path) as partial:
            partial.write_text(json.dumps(description, indent=1) + "\n")
    if read_json(path, DESCRIPTION) != description:
        raise UserError(
            f"{unfinished} holds shards of an unfinished precomputation with other encoders or of another source; remove it "
            "or choose another output."
        )


def _publish(unfinished: Path, out: Path, names: list[Path]) -> bool:
    """Give the folder its name if all shards are there; another process may do so at the same moment."""
    try:
        if not all((unfinished / name).exists() for name in names):
            return out.is_dir() and all((out / name).exists() for name in names)
        for leftover in unfinished.rglob("*.partial"):  # of processes that were killed
            leftover.unlink(missing_ok=True)
        for folder in {unfinished, *((unfinished / name).parent for name in names)}:
            durable.sync(folder)
        if out.is_dir():
            out.rmdir()
        unfinished.rename(out)
    except FileNotFoundError:
        return True
    durable.sync(out.parent)
    return True


def _description(config: RunConfig, source: Path) -> dict[str, Any]:
    """Return the ``dataset.json`` to be: that of the source, and which encoders make the embeddings."""
    path = source / DATASET
    description: dict[str, Any] = {"name": source.name}
    if path.exists():
        description = read_json(path, DESCRIPTION)
    asked = config.data.precompute
    described = describe_autoencoder(config.encoders.autoencoder) if asked.latents else {}
    if not config.model.is_class_conditional:
        described |= describe_text_encoder(config)
    samples = {
        "captions": config.data.captions,
        "upscale": config.data.upscale,
        "filter": config.data.filter,
        "storage": asked.storage.value,
        "crops": asked.crops,
        "flips": asked.flips,
    }
    if config.data.buckets is not None:
        samples["buckets"] = list(map(str, buckets_of(config, config.model.sample_size)))
    return description | {"encoders": described, "samples": samples}
