"""Writes WebDataset shards that :mod:`rmoe_megatron.data.shards.dataset` reads: images, texts, JSON, classes, plain arrays."""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from webdataset import TarWriter

from rmoe_megatron.data.shards.decoding import BFLOAT16


def _array(value: Any) -> bytes:
    buffer = io.BytesIO()
    if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16:
        array = value.contiguous().view(torch.int16).numpy().view(BFLOAT16)
    else:
        array = np.asarray(value, dtype=np.float16)
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


# By the last part of a member's extension; an image is the bytes of its file.
ENCODERS: dict[str, Callable[[Any], bytes]] = {
    "png": bytes,
    "jpg": bytes,
    "webp": bytes,
    "avif": bytes,
    "txt": lambda text: text.encode(),
    "caption": lambda text: text.encode(),
    "json": lambda value: json.dumps(value).encode(),
    "cls": lambda label: str(int(label)).encode(),
    "npy": _array,
}


# Takes a sample's key and its members by extension; returns where it lies: offset and size in bytes.
ShardWriter = Callable[[str, dict[str, Any]], tuple[int, int]]


@contextmanager
def open_shard(path: Path) -> Iterator[ShardWriter]:
    """Write one shard, which is on the disk when the context ends; the same samples give the same bytes.

    Yields:
        A function of a sample's key and its members by extension: the bytes of a picture's file, text, a value of JSON, a class, or
        an array, which is stored as float16, or bfloat16 if it is a tensor of that.
    """
    with path.open("wb") as file:
        with TarWriter(file, encoder=False, user="", group="", mode=0o644, mtime=0) as tar:

            def write(key: str, members: dict[str, Any]) -> tuple[int, int]:
                offset = tar.tarstream.offset
                encoded = {name: _encoded(name, value) for name, value in members.items()}
                tar.write({"__key__": key, **encoded})
                # TarWriter writes members by their names; what fills the last one's block is not the sample's.
                filling = -len(encoded[max(encoded)]) % tarfile.BLOCKSIZE
                return offset, tar.tarstream.offset - offset - filling

            yield write
        file.flush()
        os.fsync(file.fileno())


def _encoded(extension: str, value: Any) -> bytes:
    return ENCODERS[extension.rpartition(".")[2]](value)
