"""Checks that what PyTorch will unpickle of a torch_dist checkpoint is data: run folders come from others, too.

``.metadata`` is a pickle, and so are the byte objects among the tensors in the ``.distcp`` files; PyTorch loads both
without restriction. Here each is loaded first with the classes that the format needs and no others.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

METADATA = ".metadata"

_ALLOWED = {
    "torch": {"Size"},  # and its data types
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.serialization": {"_get_layout"},
}  # fmt: skip


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


def read_metadata(path: Path) -> Metadata:
    """Return the ``.metadata`` of the checkpoint folder ``path``.

    Raises:
        pickle.UnpicklingError: it is damaged, or asks for a class that the format does not need.
    """
    try:
        metadata = _RestrictedUnpickler(io.BytesIO((path / METADATA).read_bytes())).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # whatever damaged bytes make of the allowed classes
        raise pickle.UnpicklingError(f"it cannot be read ({type(error).__name__})") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise pickle.UnpicklingError("it is not that of a checkpoint")
    return metadata


def find_untrusted(path: Path) -> str | None:
    """Return None if nothing in the checkpoint folder can execute, else one clause that says what could."""
    try:
        metadata = read_metadata(path)
    except (OSError, pickle.UnpicklingError) as error:
        return f"{path} is not loaded ({METADATA}: {error})"
    for index, place in metadata.storage_data.items():
        try:
            is_index = isinstance(index, MetadataIndex)
            described = metadata.state_dict_metadata.get(index.fqn) if is_index else None
            if described is not None and not isinstance(described, BytesStorageMetadata):
                continue  # a tensor, which PyTorch loads restricted
            name = place.relative_path
            if described is None or name != Path(name).name or getattr(place, "transform_descriptors", None):
                raise ValueError("no plain entry")
            with (path / name).open("rb") as stream:
                stream.seek(place.offset)
                content = stream.read(place.length)
            with torch.serialization.safe_globals([io.BytesIO]):
                torch.load(io.BytesIO(content), weights_only=True)
        except Exception as error:  # pickle's, zip's and torch's, and those of wrong offsets
            key = getattr(index, "fqn", index)
            return f"{path} is not loaded (the object {key!r} is no plain data: {_first_sentence(error)})"
    return None


def _first_sentence(error: Exception) -> str:
    text = str(error)
    marker = "GLOBAL "
    if marker in text:
        return f"it asks for {text.partition(marker)[2].split()[0]}"
    return text.splitlines()[0][:120] if text else type(error).__name__
