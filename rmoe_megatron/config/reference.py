"""Every key of a configuration with its type, bounds, default and meaning: for people to read, and as a JSON schema for editors.

A key's meaning is the comment above its field, or the docstring of its section or enumeration.
"""

import ast
import difflib
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from rmoe_megatron.config.bounds import MISSING, Bounds, bounds_of
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.errors import UserError

NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", dict: "mapping"}
SCHEMA_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object"}


@dataclass(frozen=True)
class Key:
    """One key of a configuration.

    Attributes:
        name: dotted; ``[]`` stands for an entry of a list, as in ``data.mixture[].path``.
        kind: its type, in words.
        default: as YAML has it; None where a value has to be given.
        bounds: what a number may be.
        meaning: a sentence, or several.
    """

    name: str
    kind: str
    default: str | None
    bounds: Bounds | None
    meaning: str

    def __str__(self) -> str:
        if self.kind == "section":
            return f"{self.name}: {self.kind}\n    {self.meaning}"
        default = "has to be given" if self.default is None else f"default {self.default}"
        allowed = f", {self.bounds}" if self.bounds is not None else ""
        return f"{self.name}: {self.kind}{allowed}; {default}\n    {self.meaning}"


def find_keys(name: str | None) -> list[Key]:
    """Return the key of a name and those below it; all keys for None.

    Raises:
        UserError: there is no such key; names the nearest one.
    """
    known = list(keys())
    asked = re.sub(r"\[\d*\]", "[]", name) if name is not None else ""
    found = [each for each in known if not asked or re.match(rf"{re.escape(asked)}(\[\]|\.|$)", each.name)]
    if not found:
        near = difflib.get_close_matches(asked, [each.name for each in known], n=1, cutoff=0.0)
        raise UserError(f"There is no key {name}; did you mean {near[0]}?")
    return found


def keys(section: type = RunConfig, prefix: str = "") -> Iterator[Key]:
    """Yield the keys of a section in the order of the file, those of its sections behind each."""
    hints, meanings = get_type_hints(section), comments(section)
    for each in fields(section):
        name, kind = f"{prefix}{each.name}", hints[each.name]
        inner, is_list = _inner(kind)
        yield Key(
            name,
            _in_words(kind),
            _default(each),
            bounds_of(section, each.name),
            _meaning(each.name, inner, meanings),
        )
        if is_dataclass(inner):
            assert isinstance(inner, type)
            yield from keys(inner, f"{name}{'[]' if is_list else ''}.")


def schema(section: type = RunConfig) -> dict[str, Any]:
    """Return a JSON schema of a section: names, types, bounds, defaults and meanings, and no other keys."""
    hints, meanings = get_type_hints(section), comments(section)
    properties = {}
    for each in fields(section):
        kind = hints[each.name]
        meaning = _meaning(each.name, _inner(kind)[0], meanings)
        properties[each.name] = _schema_of(kind, bounds_of(section, each.name)) | {"description": meaning}
    return {
        "type": "object",
        "description": documentation(section),
        "properties": properties,
        "additionalProperties": False,
    }


def documentation(kind: Any) -> str:
    """Return the docstring of a section or of an enumeration on one line."""
    return " ".join((inspect.getdoc(kind) or "").replace("``", "").split())


@cache
def comments(section: type) -> dict[str, str]:
    """Return the comments above the fields of a dataclass, or on a field's own lines, each a sentence."""
    source = inspect.getsource(sys.modules[section.__module__])
    told = {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and not token.string.startswith(("# noqa", "# type:"))
    }
    body = next(
        node.body
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == section.__name__
    )
    found = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own = [told[line][0] for line in range(node.lineno, (node.end_lineno or 0) + 1) if line in told]
            line, above = node.lineno - 1, list[str]()
            while line in told and told[line][1]:
                above.insert(0, told[line][0])
                line -= 1
            text = " ".join(own or above)
            if text:
                found[node.target.id] = text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")
    return found


def _meaning(name: str, inner: Any, meanings: dict[str, str]) -> str:
    """Return what the comment at a field says, or else the docstring of its section or enumeration."""
    is_documented = is_dataclass(inner) or (isinstance(inner, type) and issubclass(inner, Enum))
    return meanings.get(name) or (documentation(inner) if is_documented else "")


def _inner(kind: Any) -> tuple[Any, bool]:
    """Return a type without None, of a list that of its entries, and whether it is a list."""
    if get_origin(kind) in (Union, UnionType):
        kind = next(each for each in get_args(kind) if each is not NoneType)
    return (get_args(kind)[0], True) if get_origin(kind) is list else (get_origin(kind) or kind, False)


def _in_words(kind: Any) -> str:
    inner, is_list = _inner(kind)
    may_be_null = NoneType in get_args(kind)
    if isinstance(inner, type) and issubclass(inner, Enum):
        words = "one of " + ", ".join(each.value for each in inner)
    else:
        words = "section" if is_dataclass(inner) else NAMES[inner]
    return f"{f'list of {words}s' if is_list else words}{' or null' if may_be_null else ''}"


def _default(each: Field[Any]) -> str | None:
    value = each.default if each.default_factory is NO_DEFAULT else each.default_factory()
    if value is MISSING or value == MISSING:
        return None
    if isinstance(value, Enum):
        return str(value.value)
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def _schema_of(kind: Any, bounds: Bounds | None) -> dict[str, Any]:
    inner, is_list = _inner(kind)
    if is_dataclass(inner):
        assert isinstance(inner, type)
        found = schema(inner)
    elif isinstance(inner, type) and issubclass(inner, Enum):
        found = {"enum": [each.value for each in inner]}
    else:
        found = {"type": SCHEMA_TYPES[inner]}
    if bounds is not None:
        limits = {
            "minimum": bounds.least,
            "maximum": bounds.most,
            "exclusiveMinimum": bounds.above,
            "exclusiveMaximum": bounds.below,
        }
        found |= {name: limit for name, limit in limits.items() if abs(limit) != float("inf")}
    if is_list and inner is str:
        found = {"anyOf": [found, {"type": "integer"}]}  # class labels, which the loader makes texts of
    if is_list:
        found = {"type": "array", "items": found}
    return {"anyOf": [found, {"type": "null"}]} if NoneType in get_args(kind) else found
