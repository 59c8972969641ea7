"""Checks that what PyTorch will unpickle of a torch_dist checkpoint is data: run folders come from others, too.

``.metadata`` is a pickle, and so are the byte objects among the tensors in the ``.distcp`` files; PyTorch loads both
without restriction. Here each is loaded first with the classes that the format needs and no others, and what it says is checked:
every tensor and object lies in a file of the folder itself.
"""

import io
import pickle
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem

from rmoe_megatron.errors import UserError
from rmoe_megatron.files.regular import open_regular, read_bytes

METADATA = ".metadata"
MAX_BYTES = 1 << 28  # of .metadata; a model of 8 billion parameters on 64 ranks has some 10 MB
MAX_AXES = 16
EXTRA_STATE = "_extra_state"  # of a layer; Transformer Engine unpickles it

_ALLOWED = {
    "torch": {"Size"},  # and its data types
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    # Megatron-Core 0.16 wrote down how each rank had planned to save; nothing reads it.
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.serialization": {"_get_layout"},
}  # fmt: skip
_OBJECTS = (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    SavePlan,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
    TensorWriteData,
    WriteItem,
    _StorageInfo,
)
_PLAIN = (str, int, float, bool, type(None), torch.dtype, torch.layout)
# What a pickle of these classes consists of.
_OPERATIONS = (
    "PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE",
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "EMPTY_TUPLE", "TUPLE1", "TUPLE2",
    "TUPLE3", "TUPLE", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL", "REDUCE",
    "NEWOBJ", "BUILD",
)  # fmt: skip


_PYTHON: Any = pickle._Unpickler  # whose methods have no types


class _RestrictedUnpickler(pickle._Unpickler):
    """Python's own unpickler with few operations and classes.

    Tuples of tuples that share their parts are small in a pickle and take for ever to hash, compare or print. So nothing is hashed
    before it is known to be plain: neither a key of a dictionary nor an argument of a call.
    """

    stack: list[Any]
    dispatch = {
        code: pickle._Unpickler.dispatch[code] for name in _OPERATIONS for code in getattr(pickle, name)
    }

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")

    def _load_setitem(self) -> None:
        _check_key(self.stack[-2])
        _PYTHON.load_setitem(self)

    def _load_setitems(self) -> None:
        for key in self.stack[::2]:
            _check_key(key)
        _PYTHON.load_setitems(self)

    def _load_reduce(self) -> None:
        arguments = self.stack[-1]
        for argument in arguments:
            _check_plain(argument)
        _PYTHON.load_reduce(self)

    def _load_newobj(self) -> None:
        if self.stack[-1] != () or self.stack[-2] not in _OBJECTS:
            raise pickle.UnpicklingError("it makes an object in a way that no checkpoint does")
        _PYTHON.load_newobj(self)

    def _load_build(self) -> None:
        made, state = self.stack[-2:]
        if type(made) not in _OBJECTS:
            raise pickle.UnpicklingError("it changes what is no part of it")
        if type(made) is TensorProperties:
            for value in state:
                if type(value).__name__ != "_MEM_FORMAT_ENCODING":
                    _check_plain(value)
        elif type(state) is not dict or not all(type(key) is str for key in state):
            raise pickle.UnpicklingError(
                f"the state of a {type(made).__name__} is no dictionary of its fields"
            )
        _PYTHON.load_build(self)

    _checked: ClassVar[dict[bytes, Any]] = {
        pickle.SETITEM: _load_setitem,
        pickle.SETITEMS: _load_setitems,
        pickle.REDUCE: _load_reduce,
        pickle.NEWOBJ: _load_newobj,
        pickle.BUILD: _load_build,
    }
    dispatch |= {operation[0]: load for operation, load in _checked.items()}


def _is_sizes(value: object) -> bool:
    """Whether a value is a tuple of a few whole numbers: a shape, or an offset in a tensor."""
    return (
        isinstance(value, tuple)
        and len(value) <= MAX_AXES
        and all(type(each) is int and 0 <= each < 1 << 62 for each in value)
    )


def _check_plain(value: object) -> None:
    if not isinstance(value, _PLAIN) and not _is_sizes(value):
        raise pickle.UnpicklingError(f"a {type(value).__name__} stands where a number or a text belongs")


def _check_key(key: object) -> None:
    if isinstance(key, MetadataIndex):
        offset = getattr(key, "offset", None)
        is_plain = type(getattr(key, "fqn", None)) is str and (offset is None or _is_sizes(offset))
    else:
        is_plain = isinstance(key, str | int)
    if not is_plain:
        raise pickle.UnpicklingError(f"a {type(key).__name__} is a key")


def read_metadata(path: Path) -> Metadata:
    """Return the ``.metadata`` of the checkpoint folder ``path``, every field of the type that it should have.

    Raises:
        pickle.UnpicklingError: it cannot be read, is damaged, asks for a class that the format does not need, or describes what
            no checkpoint has.
    """
    try:
        metadata = _RestrictedUnpickler(io.BytesIO(read_bytes(path / METADATA, MAX_BYTES))).load()
        _check_types(metadata)
    except pickle.UnpicklingError:
        raise
    except UserError as error:
        raise pickle.UnpicklingError(str(error).rstrip(".")) from error
    except Exception as error:  # whatever damaged bytes make of the allowed classes
        raise pickle.UnpicklingError(f"it cannot be read ({type(error).__name__})") from error
    return metadata


def _check_types(metadata: object) -> None:
    """Check that metadata are those of a checkpoint, down to their numbers."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise pickle.UnpicklingError("it is not that of a checkpoint")
    if metadata.planner_data is not None or not isinstance(metadata.storage_meta, StorageMeta | None):
        raise pickle.UnpicklingError("it holds what no checkpoint of this package has")
    described = metadata.state_dict_metadata
    if not isinstance(described, dict) or not all(type(key) is str for key in described):
        raise pickle.UnpicklingError("its tensors have no names")
    for key, value in described.items():
        if not isinstance(value, BytesStorageMetadata) and not _is_tensor(value):
            raise pickle.UnpicklingError(f"{key[:80]!r} is described as no tensor and no object")
    for index, place in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex):
            raise pickle.UnpicklingError("it names places in files otherwise than by tensors")
        _check_key(index)  # it may have been changed since it became a key
        if index.fqn not in described or not _is_place(place):
            raise pickle.UnpicklingError(f"{index.fqn[:80]!r} has no place in a file")


def _is_tensor(value: object) -> bool:
    return (
        isinstance(value, TensorStorageMetadata)
        and isinstance(value.properties, TensorProperties)
        and isinstance(value.properties.dtype, torch.dtype)
        and _is_sizes(value.size)
        and isinstance(value.chunks, list)
        and all(
            isinstance(chunk, ChunkStorageMetadata) and _is_sizes(chunk.offsets) and _is_sizes(chunk.sizes)
            for chunk in value.chunks
        )
    )


def _is_place(place: object) -> bool:
    return (
        isinstance(place, _StorageInfo)
        and type(place.relative_path) is str
        and _is_sizes((place.offset, place.length))
        and not place.transform_descriptors
    )


def find_untrusted(path: Path) -> str | None:
    """Return None if nothing in the checkpoint folder can execute or leads out of it, else one clause that says what could."""
    try:
        metadata = read_metadata(path)
    except pickle.UnpicklingError as error:
        return f"{path} is not loaded ({METADATA}: {error})"
    sizes: dict[str, int] = {}
    for index, place in metadata.storage_data.items():
        name, kind = place.relative_path, "tensor"
        try:
            if name not in sizes:
                sizes[name] = _size_of(path, name)
            if place.offset + place.length > sizes[name]:
                raise ValueError(f"{name} ends before it")
            if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
                kind = "object"
                _check_object(index.fqn, path / name, place)
        except Exception as error:  # pickle's, zip's and torch's, and those of wrong offsets
            return f"{path} is not loaded (the {kind} {index.fqn[:120]!r} is no plain data: {_first_sentence(error)})"
    return None


def _size_of(path: Path, name: str) -> int:
    """Return the size of a file of the checkpoint that holds tensors."""
    if name != Path(name).name or name in ("", ".", ".."):
        raise ValueError(f"it lies at {name[:120]!r}, which is no file of this folder")
    with open_regular(path / name) as file:
        return file.seek(0, io.SEEK_END)


def _check_object(key: str, file: Path, place: _StorageInfo) -> None:
    with open_regular(file) as stream:
        stream.seek(place.offset)
        content = stream.read(place.length)
    with torch.serialization.safe_globals([io.BytesIO]):
        value = torch.load(io.BytesIO(content), weights_only=True)
    # Transformer Engine's layers unpickle theirs. They are not handed on here, and those that were saved here hold nothing.
    if EXTRA_STATE in key and not _is_empty(value):
        raise ValueError("the extra state of a layer holds something, which the layer could unpickle")


def _is_empty(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_empty(each) for each in value)
    return value is None or (isinstance(value, torch.Tensor) and value.numel() == 0)


def _first_sentence(error: Exception) -> str:
    text = str(error)
    marker = "GLOBAL "
    if marker in text:
        return f"it asks for {text.partition(marker)[2].split()[0]}"
    return text.splitlines()[0][:200] if text else type(error).__name__
