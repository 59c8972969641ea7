"""Writes WebDataset shards that :mod:`rmoe_megatron.data.shards` reads: images, texts, JSON, classes, plain arrays."""

import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from webdataset import TarWriter


def _array(value: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(value, dtype=np.float16), allow_pickle=False)
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


@contextmanager
def open_shard(path: Path) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """Write one shard, which is on the disk when the context ends; the same samples give the same bytes.

    Yields:
        A function of a sample's key and its members by extension: the bytes of a picture's file, text, a value of JSON, a class, or
        an array, which is stored as float16.
    """
    with path.open("wb") as file:
        with TarWriter(file, encoder=False, user="", group="", mode=0o644, mtime=0) as tar:
            yield lambda key, members: tar.write(
                {"__key__": key, **{name: _encoded(name, value) for name, value in members.items()}}
            )
        file.flush()
        os.fsync(file.fileno())


def _encoded(extension: str, value: Any) -> bytes:
    return ENCODERS[extension.rpartition(".")[2]](value)
