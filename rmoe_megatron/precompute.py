"""Frozen encoders applied once: raw shards in, shards with latents and text embeddings out."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from safetensors.torch import save
from torch import Tensor

from rmoe_megatron import durable
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.data.decoding import crop_of
from rmoe_megatron.data.index import LATENTS
from rmoe_megatron.data.samples import CLASS_LABEL, TEXT_HIDDEN_STATES, TEXT_POOLED, SampleFormat, image_of
from rmoe_megatron.data.shard_writer import open_shard
from rmoe_megatron.data.shards import ShardDataset
from rmoe_megatron.encoders.autoencoder import Autoencoder, encode_images, load_autoencoder
from rmoe_megatron.encoders.conditions import NULL_TEXT
from rmoe_megatron.encoders.source import model_folder
from rmoe_megatron.encoders.text import (
    TEXT_FILES,
    CaptionEncoder,
    encode_captions,
    load_text_encoder,
    minilm_folder,
)
from rmoe_megatron.errors import UserError
from rmoe_megatron.launch import local_rank, rank, world_size
from rmoe_megatron.model.checks import check_model
from rmoe_megatron.platform import select_device
from rmoe_megatron.training.preflight import buckets_of, sample_format
from rmoe_megatron.typed_files import read_json

BATCH = 256
DATASET = "dataset.json"
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
    device = select_device(config.device, local_rank())
    captions = None
    if not config.model.is_class_conditional:
        captions = CaptionCache(load_text_encoder(config.encoders, config.model.text_length, device))
    autoencoder = load_autoencoder(config.encoders.autoencoder, device)
    taken = sample_format(config)
    unfinished = durable.unfinished(out)
    _claim(config, source, unfinished)
    if captions is not None and not (unfinished / NULL_TEXT).exists():
        null_text = encode_captions(captions.text_encoder, [""])
        tensors = {"text_hidden_states": null_text.hidden_states, "text_pooled": null_text.pooled}
        with durable.writing(unfinished / NULL_TEXT) as partial:
            partial.write_bytes(save(tensors))
    for done, shard in enumerate(mine):
        target = unfinished / shard.relative_to(source)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with durable.writing(target) as partial:
                encode_shard(shard, partial, captions, autoencoder, taken)
        if progress is not None:
            progress(done + 1, len(mine))
    return _publish(unfinished, out, [shard.relative_to(source) for shard in shards])


def check_precompute(config: RunConfig, source: Path, out: Path) -> list[Path]:
    """Check where shards come from and go to; returns those that are to be encoded, in the order of their names.

    None are if ``out`` is the finished work of the same configuration: a part of it may be asked for again.

    Raises:
        UserError: see :func:`precompute`.
    """
    check_model(config)
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


class CaptionCache:
    """Encodes captions and keeps the latest ones, whose order is that of their encoding: toy captions repeat.

    Args:
        max_bytes: of what is kept beside the captions asked for last; T5's states of one caption take megabytes.
    """

    def __init__(self, text_encoder: CaptionEncoder, max_bytes: int = 1 << 30) -> None:
        self.text_encoder, self.max_bytes = text_encoder, max_bytes
        self.encoded: dict[str, tuple[Tensor, Tensor]] = {}
        self.bytes = 0

    def add(self, captions: set[str]) -> None:
        """Make sure that ``captions``, of one batch, are encoded."""
        new = sorted(captions - self.encoded.keys(), key=lambda caption: (len(caption), caption))
        if not new:
            return
        text = encode_captions(self.text_encoder, new)
        rows = zip(text.hidden_states.half().cpu(), text.pooled.half().cpu(), strict=True)
        for caption, (states, pooled) in zip(new, rows, strict=True):
            # Copies: a view would keep the whole batch alive.
            self.encoded[caption] = states.clone(), pooled.clone()
            self.bytes += states.nbytes + pooled.nbytes
        for caption in [each for each in self.encoded if each not in captions]:
            if self.bytes <= self.max_bytes:
                break
            self.bytes -= sum(tensor.nbytes for tensor in self.encoded.pop(caption))


def encode_shard(
    shard: Path,
    target: Path,
    captions: CaptionCache | None,
    autoencoder: Autoencoder,
    sample_format: SampleFormat,
) -> None:
    """Encode the samples of one shard; without ``captions`` text is copied and not embedded."""
    samples = ShardDataset(shard.parent, shards=[shard.name], sample_filter=sample_format.filter)
    samples.bucketing = sample_format.bucketing
    divided_by = sample_format.bucketing if sample_format.divides else None
    samples.keep(sample_format.takes, sample_format.needed, divided_by)

    def usable(index: int) -> dict[str, Any] | None:
        """Return a sample with its caption as ``txt``; of several one, by the place in the shard."""
        try:
            sample = samples.decoded(index)
            if captions is not None:
                sample["txt"] = sample_format.caption(sample, index)
            if divided_by is not None:
                sample["json"] = _with_crop(samples, index, sample.get("json"))
            return sample
        except (OSError, ValueError) as error:
            samples.warn(index, error)
            return None

    with open_shard(target) as write:
        for start in range(0, len(samples), BATCH):
            batch = range(start, min(start + BATCH, len(samples)))
            batch_samples = [sample for index in batch if (sample := usable(index)) is not None]
            if not batch_samples:
                continue
            if captions is not None:
                captions.add({sample["txt"] for sample in batch_samples})
            for sample, latents in zip(batch_samples, _encoded(autoencoder, batch_samples), strict=True):
                members = {LATENTS: latents.cpu()}
                if captions is not None:
                    hidden_states, pooled = captions.encoded[sample["txt"]]
                    members |= {TEXT_HIDDEN_STATES: hidden_states, TEXT_POOLED: pooled}
                kept = {name: sample[name] for name in ("txt", "json", CLASS_LABEL) if name in sample}
                write(sample["__key__"], members | kept)


def _with_crop(samples: ShardDataset, index: int, described: Any) -> dict[str, Any]:
    """Return the JSON of a sample with the part of its picture that is encoded, in pixels of the upright picture."""
    assert samples.bucketing is not None
    crop = crop_of(*samples.size(index), samples.bucketing.buckets[samples.place(index)[0]])
    return (described if isinstance(described, dict) else {}) | {"crop": asdict(crop)}


def _encoded(autoencoder: Autoencoder, samples: list[dict[str, Any]]) -> Iterator[Tensor]:
    """Yield the latents of samples one after the other; neighbours of one size are encoded together."""
    for _, alike in groupby(map(image_of, samples), lambda image: image.shape):
        yield from encode_images(autoencoder, torch.from_numpy(np.stack(list(alike))))


def _description(config: RunConfig, source: Path) -> dict[str, Any]:
    """Return the ``dataset.json`` to be: that of the source, and which encoders make the embeddings."""
    path = source / DATASET
    description: dict[str, Any] = {"name": source.name}
    if path.exists():
        description = read_json(path, DESCRIPTION)
    encoders = config.encoders
    described: dict[str, Any] = {"autoencoder": encoders.autoencoder}
    if not config.model.is_class_conditional:
        described |= {
            "text_encoder": encoders.text_encoder,
            "text_encoder_sha256": _text_encoder_sha256(encoders.text_encoder),
            "text_encoders_dropped": encoders.dropped,
            "text_length": config.model.text_length,
        }
    samples = {
        "captions": config.data.captions,
        "upscale": config.data.upscale,
        "filter": config.data.filter,
    }
    if config.data.buckets is not None:
        samples["buckets"] = list(map(str, buckets_of(config, config.model.sample_size)))
    return description | {"encoders": described, "samples": samples}


def _text_encoder_sha256(name: str) -> str:
    """Return the SHA-256 of the weights of a text encoder, or of all text encoders of a pipeline."""
    folder = minilm_folder() if name == "minilm" else model_folder(name, TEXT_FILES)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("text_encoder*/*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
