"""Frozen encoders applied once: raw shards in, shards with latents and text embeddings out."""

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from rmoe_megatron import durable
from rmoe_megatron.config.schema import RunConfig
from rmoe_megatron.config.validation import check_writable
from rmoe_megatron.data.shards import LATENTS, TEXT_HIDDEN_STATES, TEXT_POOLED, ShardDataset
from rmoe_megatron.encoders.autoencoder import Autoencoder, encode_images, load_autoencoder
from rmoe_megatron.encoders.text import TextEncoder, load_text_encoder, text_encoder_folder
from rmoe_megatron.errors import UserError
from rmoe_megatron.platform import select_device

NULL_TEXT = "null_text.safetensors"
BATCH = 256


def precompute(
    config: RunConfig, source: Path, out: Path, progress: Callable[[int, int], None] | None = None
) -> None:
    """Encode every shard below ``source`` into a shard of the same name below ``out``.

    ``out`` appears whole or not at all. Beside the shards it holds ``dataset.json`` with the encoders' fingerprints
    and the embedding of the empty caption.

    Args:
        config: its ``encoders``, ``model`` and ``device`` sections are used.
        progress: called with (shards done, shards in total).

    Raises:
        UserError: ``source`` has no shards, or ``out`` is not empty or cannot be written.
    """
    shards = sorted(source.rglob("*.tar"))
    if not shards:
        raise UserError(f"There are no .tar shards in or below {source}; build or download the data first.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; choose another one or remove it first.")
    check_writable(out, "The output")
    device = select_device(config.device)
    text_encoder = load_text_encoder(config.encoders.text_encoder, config.model.text_length, device)
    autoencoder = load_autoencoder(config.encoders.autoencoder, device)
    building = out.with_name(f".{out.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    captions = CaptionCache(text_encoder)
    for done, shard in enumerate(shards):
        target = building / shard.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        encode_shard(shard, target, captions, autoencoder)
        if progress is not None:
            progress(done + 1, len(shards))
    null_text = text_encoder.encode([""])
    save_file(
        {"text_hidden_states": null_text.hidden_states, "text_pooled": null_text.pooled}, building / NULL_TEXT
    )
    _describe(config, source, building)
    durable.publish(building, out)


class CaptionCache:
    """Encodes captions in batches of similar length and keeps the latest ones: toy captions repeat."""

    CAPACITY = 20_000

    def __init__(self, text_encoder: TextEncoder) -> None:
        self.text_encoder = text_encoder
        self.encoded: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, captions: set[str]) -> None:
        """Make sure that ``captions`` are encoded."""
        if len(self.encoded) > self.CAPACITY:
            self.encoded.clear()
        new = sorted(captions - self.encoded.keys(), key=lambda caption: (len(caption), caption))
        for start in range(0, len(new), BATCH):
            batch = new[start : start + BATCH]
            text = self.text_encoder.encode(batch)
            # Copies: a view would keep the whole batch alive.
            rows = zip(text.hidden_states.half(), text.pooled.half(), strict=True)
            self.encoded |= {
                caption: (states.clone(), pooled.clone())
                for caption, (states, pooled) in zip(batch, rows, strict=True)
            }


def encode_shard(shard: Path, target: Path, captions: CaptionCache, autoencoder: Autoencoder) -> None:
    """Encode the samples of one shard."""
    samples = ShardDataset(shard.parent, shards=[shard])
    captions.add({samples[index]["txt"] for index in range(len(samples))})
    with target.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for start in range(0, len(samples), BATCH):
                batch_samples = [samples[index] for index in range(start, min(start + BATCH, len(samples)))]
                images = torch.from_numpy(np.stack([_image(sample) for sample in batch_samples]))
                for sample, latents in zip(batch_samples, encode_images(autoencoder, images), strict=True):
                    hidden_states, pooled = captions.encoded[sample["txt"]]
                    key = sample["__key__"]
                    _add(tar, f"{key}.{LATENTS}", _array(latents))
                    _add(tar, f"{key}.{TEXT_HIDDEN_STATES}", _array(hidden_states))
                    _add(tar, f"{key}.{TEXT_POOLED}", _array(pooled))
                    _add(tar, f"{key}.txt", sample["txt"].encode())
                    if "json" in sample:
                        _add(tar, f"{key}.json", json.dumps(sample["json"]).encode())
        file.flush()
        os.fsync(file.fileno())


def _image(sample: dict) -> np.ndarray:
    return next(sample[extension] for extension in ("png", "jpg", "jpeg") if extension in sample)


def _array(tensor: Tensor) -> bytes:
    """Serialise as a float16 .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, tensor.to("cpu", torch.float16).numpy(), allow_pickle=False)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    tar.addfile(header, io.BytesIO(content))


def _describe(config: RunConfig, source: Path, building: Path) -> None:
    """Write ``dataset.json``: that of the source, and which encoders made the embeddings."""
    path = source / "dataset.json"
    description = json.loads(path.read_text()) if path.is_file() else {"name": source.name}
    weights = text_encoder_folder(config.encoders.text_encoder) / "model.safetensors"
    description["encoders"] = {
        "text_encoder": config.encoders.text_encoder,
        "text_encoder_sha256": hashlib.sha256(weights.read_bytes()).hexdigest()
        if weights.is_file()
        else None,
        "text_length": config.model.text_length,
        "autoencoder": config.encoders.autoencoder,
    }
    (building / "dataset.json").write_text(json.dumps(description, indent=1) + "\n")
