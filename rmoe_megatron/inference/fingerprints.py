"""What models are, told by what is in their files: a record of digests, the same wherever the files lie."""

import json
from pathlib import Path

from rmoe_megatron.errors import UserError
from rmoe_megatron.files.sha256 import sha256_of
from rmoe_megatron.files.untrusted import read_json
from rmoe_megatron.inference.provenance import Record, content_digest, digest
from rmoe_megatron.pretrained.config_files import OBJECT
from rmoe_megatron.pretrained.model_files import MODEL_INDEX, loaded_files
from rmoe_megatron.pretrained.pipeline_folder import pipeline_folder

DIGITS = 16


def pipeline_record(folder: Path) -> Record:
    """Return what a diffusers folder holds: a digest for every component, and what ``model_index.json`` says besides.

    Raises:
        UserError: the folder is none, or a file in it cannot be read.
    """
    folder = pipeline_folder(folder)
    index = read_json(folder / MODEL_INDEX, OBJECT)
    record: Record = {"pipeline": index.get("_class_name")}
    for key, value in index.items():
        if key.startswith("_"):
            continue
        record[key] = model_digest(folder / key) if (folder / key).is_dir() else value
    return record


def model_digest(folder: Path) -> str:
    """Return sixteen digits of the SHA-256 of what a model's or a tokenizer's folder holds.

    Of the configurations the entries that begin with an underscore are left out but the class: they say which version wrote them,
    and from where it was loaded.

    Raises:
        UserError: there is nothing in it, or a file in it cannot be read.
    """
    files = [folder / name for name in loaded_files(folder)]
    if not files:
        raise UserError(f"There is no model in {folder}; download it again.")
    return digest({path.name: _file_digest(path) for path in files})


def file_digest(path: Path) -> str:
    """Return sixteen digits of the SHA-256 of a large file, which is read once as long as it does not change.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return sha256_of(path)[:DIGITS]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path.") from error


def _file_digest(path: Path) -> str:
    if path.suffix == ".safetensors":
        return file_digest(path)
    if path.name.endswith("config.json"):
        values = read_json(path, OBJECT, allow_infinite=True)
        kept = {key: each for key, each in values.items() if not key.startswith("_") or key == "_class_name"}
        return digest(json.dumps(kept, sort_keys=True))
    return content_digest(path)
