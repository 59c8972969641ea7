"""What made the files of an evaluation, kept with each of them.

A record is a JSON object of all that a file depends on: prompt or questions, weights, sampler, judge, code. A picture carries it
inside, as text of the PNG file; any other file has it beside itself, in the folder ``made_by``. What another command left is never
taken for this one's: a file of another record is refused, with the first differences by name, or made anew if that is asked for.
"""

import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin
from pydantic import TypeAdapter

from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic
from rmoe_megatron.files.foreign_errors import refusal
from rmoe_megatron.files.images import FORMATS
from rmoe_megatron.files.regular import open_regular
from rmoe_megatron.files.untrusted import parse_json, read_json

Record = dict[str, Any]

RECORD = TypeAdapter(Record)
KEY = "made_by"  # of a PNG file's text, and the folder beside other files
NAMED = 3  # differences in a message
SHOWN = 60  # characters of a value in a message
AGAIN = "choose another --out, or add --again to make anew what differs"


class Product:
    """One file of an evaluation and what it has to be made by.

    Args:
        path: where the file lies.
        record: returns its record, the same on every rank; called once, and only if the file is there or about to be made.
    """

    def __init__(self, path: Path, record: Callable[[], Record]) -> None:
        self.path, self._record = path, record
        self._is_made = False

    @functools.cached_property
    def record(self) -> Record:
        """What the file has to be made by, as JSON has it."""
        return parse_json(json.dumps(self._record()), RECORD, f"the record of {self.path}")

    @property
    def is_made(self) -> bool:
        """Whether the file is there and was made by what it has to be made by."""
        self._is_made = self._is_made or (self.path.exists() and read_record(self.path) == self.record)
        return self._is_made

    def differences(self) -> list[str]:
        """Return what a file that is there was made by instead; nothing if there is none."""
        if self.is_made or not self.path.exists():
            return []
        found = read_record(self.path)
        return ["it does not say what made it"] if found is None else differences(found, self.record)

    def write(self, content: bytes) -> None:
        """Put the file in its place, whole, with its record; a picture's content is that of :func:`png_with`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.suffix != ".png":
            self.path.unlink(
                missing_ok=True
            )  # no file has the record of another one, whenever this process ends
            beside = _record_beside(self.path)
            beside.parent.mkdir(exist_ok=True)
            with atomic.writing(beside) as partial:
                partial.write_text(json.dumps(self.record, indent=1) + "\n")
        with atomic.writing(self.path) as partial:
            partial.write_bytes(content)


def png_with(image: Image.Image, record: Record) -> bytes:
    """Return an image as the bytes of a PNG file that carries a record."""
    text = PngImagePlugin.PngInfo()
    text.add_text(KEY, json.dumps(record))
    buffer = io.BytesIO()
    image.save(buffer, format="png", pnginfo=text)
    return buffer.getvalue()


def read_record(path: Path) -> Record | None:
    """Return the record of a file, None if it has none.

    Raises:
        UserError: the record, or the picture, cannot be read.
    """
    if path.suffix == ".png":
        with (
            refusal(f"{path} cannot be read as a picture"),
            open_regular(path) as file,
            Image.open(file, formats=FORMATS) as image,
        ):
            text = image.info.get(KEY)  # of what stands before the pixels, which are not decoded
        return parse_json(text, RECORD, f"{KEY} of {path}") if isinstance(text, str) else None
    beside = _record_beside(path)
    return read_json(beside, RECORD) if beside.exists() else None


def require_records(products: Iterable[Product], again: bool) -> None:
    """Check that every file that is there was made by what it has to be made by; nothing is checked for ``again``.

    Raises:
        UserError: names the first file that was not, and the differences.
    """
    if again:
        return
    for product in products:
        found = product.differences()
        if found:
            raise UserError(f"{product.path} was made by another command ({_listed(found)}); {AGAIN}.")


def require_results(path: Path, identity: Record, again: bool) -> None:
    """Check that results that are there are of the same evaluation; nothing is checked for ``again``.

    Args:
        path: where ``results.json`` lies.
        identity: the part of the results that says what was evaluated and how.

    Raises:
        UserError: they are of another evaluation; names the differences.
    """
    if again or not path.exists():
        return
    found = read_json(path, RECORD)
    expected = parse_json(json.dumps(identity), RECORD, "the evaluation")
    different = differences({key: found.get(key) for key in expected}, expected)
    if different:
        raise UserError(f"{path} holds another evaluation ({_listed(different)}); {AGAIN}.")


def differences(found: Record, expected: Record, prefix: str = "") -> list[str]:
    """Return in what two records differ, as ``steps 2 instead of 1``, in the order of the expected one."""
    different = []
    for key in {**expected, **found}:
        one, other = found.get(key), expected.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            different += differences(one, other, f"{prefix}{key} ")
        elif one != other:
            different.append(f"{prefix}{key} {_shown(one)} instead of {_shown(other)}")
    return different


def digest(value: object) -> str:
    """Return sixteen digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def content_digest(path: Path) -> str:
    """Return sixteen digits of the SHA-256 of a file.

    Raises:
        UserError: it cannot be read.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _record_beside(path: Path) -> Path:
    return path.parent / KEY / f"{path.name}.json"


def _listed(different: Sequence[str]) -> str:
    more = f"; and {len(different) - NAMED} more differences" if len(different) > NAMED else ""
    return "; ".join(different[:NAMED]) + more


def _shown(value: object) -> str:
    text = json.dumps(value) if value is not None else "nothing"
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
