"""What a value of a table or of JSON says as captions."""

import math
from decimal import Decimal
from typing import Any

KEYS = ("text", "caption", "raw")  # under which sets of the hub keep a caption inside of a value


def captions_of(value: Any) -> list[str]:
    """Return the captions that ``value`` holds, without space around them and without empty ones.

    Text is one; bytes are UTF-8; a number is the text that it is written as; a list holds one each (COCO, Flickr30k); an object has
    it under ``text``, ``caption`` or ``raw``. None of them is none.
    """
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError:
            return []
    if isinstance(value, str):
        text = value.removeprefix("\ufeff").strip()
        return [text] if text else []
    if isinstance(value, bool) or value is None:
        return []
    if isinstance(value, int | float | Decimal):
        return [str(value)] if math.isfinite(value) else []
    if isinstance(value, list):
        return [text for each in value if not isinstance(each, list) for text in captions_of(each)]
    if isinstance(value, dict):
        return next((found for key in KEYS if (found := captions_of(value.get(key)))), [])
    return []


def is_list_of_captions(value: Any) -> bool:
    """Whether ``value`` may hold several captions, be it by itself or under the key of an object."""
    if isinstance(value, dict):
        return any(isinstance(value.get(key), list) for key in KEYS)
    return isinstance(value, list)
