"""Text and JSON that come from others, read into typed values: a file is what it should be, or a UserError says why not.

Nothing here hangs on a pipe, reads without bound or recurses without bound.
"""

import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ConfigDict, TypeAdapter, ValidationError

from rmoe_megatron.errors import UserError
from rmoe_megatron.files.regular import read_bytes

MAX_BYTES = 64 << 20  # tokenizers are the largest, with some 30 MB
MAX_SHOWN = 60  # characters of a wrong value

# Of the models of JSON objects: values are not converted, and keys that are not described stay.
OPEN = ConfigDict(strict=True, extra="allow")
CLOSED = ConfigDict(strict=True, extra="forbid")


def read_text(path: Path, max_bytes: int = MAX_BYTES, follow: bool = False) -> str:
    """Return a file's text.

    Args:
        follow: the user names this very file, which may then be a link to anywhere.

    Raises:
        UserError: it is no regular file, is larger than ``max_bytes``, or is not UTF-8.
    """
    content = read_bytes(path, max_bytes, follow=follow)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text (byte {error.start} is not UTF-8).") from error


def lines_of(text: str) -> list[str]:
    r"""Return the lines of a text, which end at ``\n`` or ``\r\n`` alone.

    Python's ``splitlines`` would also end one at a form feed, at U+0085 and at U+2028, which a caption may hold. The byte-order mark
    that Excel and Notepad put first is none of the text.
    """
    lines = text.removeprefix("\ufeff").split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_json[T](path: Path, model: TypeAdapter[T], allow_infinite: bool = False) -> T:
    """Return the content of a JSON file as a value of ``model``.

    Args:
        allow_infinite: let NaN and Infinity through to ``model``; JSON has none, but Python writes them.

    Raises:
        UserError: the file cannot be read, is no JSON, has a key twice, or its value is not one of ``model``; names the
            key, what it holds and what is allowed.
    """
    return parse_json(read_text(path), model, str(path), allow_infinite)


def parse_json[T](text: str, model: TypeAdapter[T], where: str, allow_infinite: bool = False) -> T:
    """Return a JSON text as a value of ``model``; see :func:`read_json`.

    Args:
        where: what the error message calls the text.
    """

    def constant(name: str) -> float:
        if not allow_infinite:
            raise ValueError(f"{name} is no number of JSON")
        return float(name)

    def number(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            raise ValueError(f"the number {digits[:MAX_SHOWN]} is too large")
        return value

    try:
        value = json.loads(
            text, object_pairs_hook=_without_duplicates, parse_constant=constant, parse_float=number
        )
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise UserError(f"{where} is not valid JSON ({reason}).") from error
    return check_value(value, model, where)


def check_value[T](value: object, model: TypeAdapter[T], where: str) -> T:
    """Return ``value`` as one of ``model``.

    Raises:
        UserError: it is none; names the key, what it holds and what is allowed.
    """
    try:
        return model.validate_python(value, strict=True)
    except ValidationError as error:
        _refuse(where, error)


def shown(value: object) -> str:
    """Return a value as it may stand in a message: on one line, and cut."""
    try:
        text = json.dumps(value)
    except ValueError:  # a whole number too long to print
        return "a huge number"
    except TypeError:  # no JSON
        text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has the key {shown(twice)} twice")
    return values


def _refuse(where: str, error: ValidationError) -> NoReturn:
    first = error.errors(include_url=False)[0]
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]]
    key = "".join(parts).removeprefix(".")[: 2 * MAX_SHOWN]
    if first["type"] == "missing":
        raise UserError(f"{where} has no value for {key}.") from error
    if first["type"] == "extra_forbidden":
        raise UserError(f"{where} has the unknown key {shown(key)}.") from error
    rule = re.sub(r"^(Input|\w+) should", "it must", first["msg"])
    subject = (
        f"{where} has {key} {shown(first['input'])}" if key else f"{where} holds {shown(first['input'])}"
    )
    raise UserError(f"{subject}, but {rule}.") from error
