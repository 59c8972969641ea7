"""Files from others become typed values, or a sentence that names the file and what is wrong in it."""

import json
import os
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

import pytest
from pydantic import Field, TypeAdapter, with_config

from rmoe_megatron.errors import UserError
from rmoe_megatron.files.untrusted import CLOSED, OPEN, check_value, lines_of, read_json, read_text


@with_config(CLOSED)
class Inner(TypedDict):
    flag: bool


@with_config(OPEN)
class Outer(TypedDict):
    size: Annotated[int, Field(ge=1, le=10)]
    scale: NotRequired[Annotated[float, Field(le=2)]]
    inner: NotRequired[Inner | None]


OUTER = TypeAdapter(Outer)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"size": 3}', {"size": 3}),
        ('{"size": 3, "scale": 1, "inner": null, "other": [1]}',
         {"size": 3, "scale": 1, "inner": None, "other": [1]}),
        ('{"size": 10, "inner": {"flag": true}}', {"size": 10, "inner": {"flag": True}}),
    ],
)  # fmt: skip
def test_a_value_of_the_type_is_returned(text: str, expected: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "values.json"
    path.write_text(text)
    assert read_json(path, OUTER) == expected


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{}", "has no value for size"),
        (b'{"size": "3"}', 'size "3", but it must be a valid integer'),
        (b'{"size": true}', "size true, but it must be a valid integer"),
        (b'{"size": 3.0}', "size 3.0, but it must be a valid integer"),
        (b'{"size": null}', "size null, but it must be a valid integer"),
        (b'{"size": 11}', "size 11, but it must be less than or equal to 10"),
        (b'{"size": 1' + b"0" * 5000 + b"}", "not valid JSON"),
        (b'{"size": 3, "scale": 1e999}', "too large"),
        (b'{"size": 3, "scale": NaN}', "NaN is no number of JSON"),
        (b'{"size": 3, "scale": -Infinity}', "-Infinity is no number of JSON"),
        (b'{"size": 3, "inner": {}}', "has no value for inner.flag"),
        (b'{"size": 3, "inner": {"flag": true, "x": 1}}', "unknown key"),
        (b'{"size": 3, "size": 4}', 'has the key "size" twice'),
        (b"[1]", "holds"),
        (b"null", "holds null"),
        (b"", "not valid JSON"),
        (b'{"size": 3', "not valid JSON"),
        (b'\xef\xbb\xbf{"size": 3}', "not valid JSON"),
        (b"\xff\xfe\x00", "byte 0 is not UTF-8"),
        (b"[" * 200_000, "too deeply nested"),
    ],
)
def test_anything_else_is_one_sentence(content: bytes, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "values.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_json(path, OUTER)
    message = str(raised.value)
    assert message.startswith(str(path))
    assert complaint in message
    assert "\n" not in message
    assert len(message) < len(str(path)) + 200


def test_a_pipe_a_folder_and_other_paths_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "large").write_bytes(b" " * 101)
    for name in ("pipe", "loop", ".", "missing", "nul\0byte", "large", "values/x"):
        with pytest.raises(UserError) as raised:
            read_text(tmp_path / name, max_bytes=100)
        assert "\0" not in str(raised.value)
    assert read_text(tmp_path / "large", max_bytes=101) == " " * 101


def test_what_a_message_shows_is_short() -> None:
    with pytest.raises(UserError, match=r"x has size \"a{59}\.\.\., but") as raised:
        check_value({"size": "a" * 100_000}, OUTER, "x")
    assert len(str(raised.value)) < 200
    huge = json.loads("1" + "0" * 4000)
    with pytest.raises(UserError, match="x has size 1000"):
        check_value({"size": huge}, OUTER, "x")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", []),
        ("a", ["a"]),
        ("a\n", ["a"]),
        ("a\r\nb\n\nc", ["a", "b", "", "c"]),
        ("\ufeffa\u2028b\x0cc\u0085d\x1ee\rf\n", ["a\u2028b\x0cc\u0085d\x1ee\rf"]),
    ],
)
def test_a_line_ends_at_a_line_feed_alone(text: str, lines: list[str]) -> None:
    assert lines_of(text) == lines
