"""The language of ``data.filter``: what holds, what a lacking value does, and that nothing else is understood."""

import operator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmoe_megatron.config.sample_filter import SampleFilter
from rmoe_megatron.errors import UserError

SAMPLE = {"width": 600, "aesthetic": 5.5, "language": "en", "nsfw": False, "tags": ["a"], "none": None}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("width >= 512 and aesthetic > 5", True),
        ("width >= 512 and aesthetic > 6", False),
        ("width < 512 or language == 'en'", True),
        ("not (width < 512 or language == 'en')", False),
        ("512 <= width < 1024", True),
        ("512 <= width < 600", False),
        ("width > -1", True),
        ("nsfw == False", True),
        ("nsfw == 0", False),  # another type
        ("language > 5", False),
        ("language != 5", False),
        ("missing > 5", False),
        ("missing != 5", False),
        ("not missing > 5", True),
        ("tags == 'a'", False),
        ("none != 'a'", False),
    ],
)
def test_what_holds(text: str, expected: bool) -> None:
    assert SampleFilter(text).takes(SAMPLE) is expected


@settings(deadline=None)
@given(
    left=st.integers(-5, 5), right=st.integers(-5, 5), symbol=st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
)  # fmt: skip
def test_comparisons_are_those_of_numbers(left: int, right: int, symbol: str) -> None:
    functions = {"<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq", "!=": "ne"}
    expected = getattr(operator, functions[symbol])(left, right)
    assert SampleFilter(f"a {symbol} {right}").takes({"a": left}) is expected


@pytest.mark.parametrize(
    "text",
    [
        "", "width", "5", "width >", "width = 5", "__import__('os').system('x')", "width.bit_length() > 5",
        "width + 1 > 5", "[x for x in y] == 5", "width in (1, 2)", "width is 5", "lambda: 5", "f'{width}' == '5'",
        "width > 5; x", "tags[0] == 'a'", "(yield) > 5", "a := 5", "not " * 500 + "a > 5", "(" * 999, "a > 5" + " " * 5000,
        "a > b'x'", "a > 1j", "a\x00 > 1",
    ],
)  # fmt: skip
def test_nothing_else_is_understood(text: str) -> None:
    with pytest.raises(UserError, match=r"data\.filter"):
        SampleFilter(text)


@settings(deadline=None)
@given(st.text("ab01<>=!&|()'\". notrd\n:,[]{}+-*/", max_size=40))
def test_any_text_is_a_filter_or_refused(text: str) -> None:
    try:
        found = SampleFilter(text)
    except UserError:
        return
    assert found.takes({"a": 1, "b": "b"}) in (True, False)
