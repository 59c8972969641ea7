"""Which frozen encoders made the embeddings of a set, so that no run trains on those of others."""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

from rmoe_megatron.config.model import ModelDescription
from rmoe_megatron.encoders.minilm import MINILM_BLOCKS, minilm_folder
from rmoe_megatron.errors import UserError
from rmoe_megatron.files.sha256 import sha256_of
from rmoe_megatron.pretrained.config_files import AUTOENCODERS, read_config
from rmoe_megatron.pretrained.hub import model_folder
from rmoe_megatron.pretrained.model_files import autoencoder_parts, text_encoder_parts, weight_files

DATASET = "dataset.json"  # beside precomputed shards


def describe_autoencoder(name: str) -> dict[str, Any]:
    """Return the name of an autoencoder and the SHA-256 of its weights and of what its latents are scaled and shifted by.

    Pixels have none.
    """
    if name == "pixel":
        return {"autoencoder": name, "autoencoder_sha256": "pixel"}
    folder = model_folder(name, autoencoder_parts)
    weights = _sha256(weight_files(folder, autoencoder_parts))
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    config = read_config(folder / "config.json", AUTOENCODERS)
    made_by = f"{weights} {config.get('scaling_factor')} {config.get('shift_factor')}"
    return {"autoencoder": name, "autoencoder_sha256": hashlib.sha256(made_by.encode()).hexdigest()}


def describe_text_encoder(config: ModelDescription) -> dict[str, Any]:
    """Return what the embeddings of captions depend on."""
    name = config.encoders.text_encoder
    parts = partial(text_encoder_parts, dropped=config.encoders.dropped)
    folder = minilm_folder() if name == "minilm" else model_folder(name, parts)
    weights = _sha256(weight_files(folder, parts))
    if name == "minilm":  # only some of its blocks are used
        weights = hashlib.sha256(f"{weights} {MINILM_BLOCKS}".encode()).hexdigest()
    return {
        "text_encoder": name,
        "text_encoder_sha256": weights,
        "text_encoders_dropped": config.encoders.dropped,
        "text_length": config.model.text_length,
    }


def check_encoders(
    described: dict[str, Any], config: ModelDescription, place: str, has_latents: bool
) -> None:
    """Check that a set was precomputed with the encoders of a configuration; names may differ, weights may not.

    Args:
        described: what the set's ``dataset.json`` says.
        place: where the set lies, for the error.
        has_latents: they are precomputed too, not the text alone.

    Raises:
        UserError: an encoder is another one, or was used in another way.
    """
    known = described.get("encoders")
    if not isinstance(known, dict):  # a set of others says nothing of its encoders
        return
    own = describe_autoencoder(config.encoders.autoencoder) if has_latents else {}
    if not config.model.is_class_conditional and "text_encoder_sha256" in known:
        own |= describe_text_encoder(config)
    for key in own.keys() & known.keys() - {"autoencoder", "text_encoder"}:
        if own[key] != known[key]:
            name = key.removesuffix("_sha256")
            what = f"{name} {known.get(name)!r} of other weights" if key != name else f"{key} {known[key]!r}"
            raise UserError(
                f"{place} was precomputed with {what}, but the configuration has {own.get(name)!r}; precompute it again with this "
                "configuration, or name the encoders that it was made with."
            )


def _sha256(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(bytes.fromhex(sha256_of(file)))
    return digest.hexdigest()
