"""Frozen encoders applied once: raw shards in, shards with latents and text embeddings out."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file
from torch import Tensor

from rmoe_megatron import durable
from rmoe_megatron.config.model import ModelDescription
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.data.shard_writer import open_shard
from rmoe_megatron.data.shards import (
    CLASS_LABEL,
    IMAGES,
    LATENTS,
    TEXT_HIDDEN_STATES,
    TEXT_POOLED,
    ShardDataset,
)
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
from rmoe_megatron.platform import select_device
from rmoe_megatron.typed_files import read_json

BATCH = 256
DESCRIPTION = TypeAdapter(dict[str, Any])


def precompute(
    config: RunConfig, source: Path, out: Path, progress: Callable[[int, int], None] | None = None
) -> None:
    """Encode every shard below ``source`` into a shard of the same name below ``out``.

    ``out`` appears whole or not at all. Beside the shards it holds ``dataset.json`` with the encoders' fingerprints
    and the embedding of the empty caption. For a class-conditional model only images are encoded.

    Args:
        config: its ``encoders``, ``model`` and ``device`` sections are used.
        progress: called with (shards done, shards in total).

    Raises:
        UserError: ``source`` has no shards, or ``out`` is not empty, overlaps with ``source`` or cannot be written.
    """
    inner, outer = out.resolve(), source.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise UserError(f"{out} and {source} overlap; choose an output folder apart from the source.")
    shards = sorted(source.rglob("*.tar"))
    if not shards:
        raise UserError(f"There are no .tar shards in or below {source}; build or download the data first.")
    durable.require_empty(out, "The output")
    device = select_device(config.device)
    captions = None
    if not config.model.is_class_conditional:
        captions = CaptionCache(load_text_encoder(config.encoders, config.model.text_length, device))
    autoencoder = load_autoencoder(config.encoders.autoencoder, device)
    with durable.building(out) as partial:
        for done, shard in enumerate(shards):
            target = partial / shard.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            encode_shard(shard, target, captions, autoencoder)
            if progress is not None:
                progress(done + 1, len(shards))
        if captions is not None:
            null_text = encode_captions(captions.text_encoder, [""])
            tensors = {"text_hidden_states": null_text.hidden_states, "text_pooled": null_text.pooled}
            save_file(tensors, partial / NULL_TEXT)
        _describe(config, source, partial)


class CaptionCache:
    """Encodes captions in batches of similar length and keeps the latest ones: toy captions repeat."""

    CAPACITY = 20_000

    def __init__(self, text_encoder: CaptionEncoder) -> None:
        self.text_encoder = text_encoder
        self.encoded: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, captions: set[str]) -> None:
        """Make sure that ``captions`` are encoded."""
        if len(self.encoded) > self.CAPACITY:
            self.encoded.clear()
        new = sorted(captions - self.encoded.keys(), key=lambda caption: (len(caption), caption))
        for start in range(0, len(new), BATCH):
            batch = new[start : start + BATCH]
            text = encode_captions(self.text_encoder, batch)
            # Copies: a view would keep the whole batch alive.
            rows = zip(text.hidden_states.half(), text.pooled.half(), strict=True)
            self.encoded |= {
                caption: (states.clone(), pooled.clone())
                for caption, (states, pooled) in zip(batch, rows, strict=True)
            }


def encode_shard(shard: Path, target: Path, captions: CaptionCache | None, autoencoder: Autoencoder) -> None:
    """Encode the samples of one shard; without ``captions`` text is copied and not embedded."""
    samples = ShardDataset(shard.parent, shards=[shard])
    needed = set() if captions is None else {"txt"}
    samples.keep(
        lambda members: needed <= members and not members.isdisjoint(IMAGES),
        ", ".join([*needed, " or ".join(IMAGES)]),
    )
    samples.require_shapes_of_first()
    if captions is not None:
        captions.add({samples[index]["txt"] for index in range(len(samples))})
    with open_shard(target) as write:
        for start in range(0, len(samples), BATCH):
            batch = range(start, min(start + BATCH, len(samples)))
            batch_samples = [sample for index in batch if (sample := _own_sample(samples, index))]
            if not batch_samples:
                continue
            images = torch.from_numpy(np.stack([_image(sample) for sample in batch_samples]))
            for sample, latents in zip(batch_samples, encode_images(autoencoder, images), strict=True):
                members = {LATENTS: latents.cpu()}
                if captions is not None:
                    hidden_states, pooled = captions.encoded[sample["txt"]]
                    members |= {TEXT_HIDDEN_STATES: hidden_states.cpu(), TEXT_POOLED: pooled.cpu()}
                kept = {name: sample[name] for name in ("txt", "json", CLASS_LABEL) if name in sample}
                write(sample["__key__"], members | kept)


def _own_sample(samples: ShardDataset, index: int) -> dict[str, Any] | None:
    """Return a sample, or None where the data set has put another in its place: that one has its own turn."""
    sample = samples[index]
    return sample if sample["__key__"] == samples.locations[index].key else None


def _image(sample: dict[str, Any]) -> np.ndarray:
    return next(sample[extension] for extension in IMAGES if extension in sample)


def _describe(config: ModelDescription, source: Path, folder: Path) -> None:
    """Write ``dataset.json``: that of the source, and which encoders made the embeddings."""
    path = source / "dataset.json"
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
    description["encoders"] = described
    (folder / "dataset.json").write_text(json.dumps(description, indent=1) + "\n")


def _text_encoder_sha256(name: str) -> str:
    """Return the SHA-256 of the weights of a text encoder, or of all text encoders of a pipeline."""
    folder = minilm_folder() if name == "minilm" else model_folder(name, TEXT_FILES)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("text_encoder*/*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
