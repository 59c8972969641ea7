"""Where a sample's caption is: ``data.captions``."""

import math
import re
from dataclasses import dataclass

from rmoe_megatron.errors import UserError

_ENTRY = re.compile(r"(?P<member>txt|caption|json:(?P<key>[^=]+))(?:=(?P<weight>[^=]*))?")


@dataclass(frozen=True)
class CaptionSource:
    """A member of a sample that is its caption, or one value of its JSON.

    Attributes:
        member: extension, ``txt``, ``caption`` or ``json``.
        key: where the caption stands in the JSON's object; None for text.
        weight: how often it is taken beside the other sources that a sample has.
    """

    member: str
    key: str | None = None
    weight: float = 1.0


def parse_captions(entries: list[str]) -> tuple[CaptionSource, ...]:
    """Return the sources that ``txt``, ``caption`` and ``json:KEY`` name, each with ``=WEIGHT`` behind it or without.

    Raises:
        UserError: an entry is none of these or is given twice, or the list is empty.
    """
    sources = []
    for entry in entries:
        match = _ENTRY.fullmatch(entry)
        weight = _weight(match["weight"]) if match is not None else None
        if match is None or weight is None:
            raise UserError(
                f"data.captions has the entry {entry!r:.80}; write txt, caption or json:KEY, with a positive weight behind it "
                "if you like, as in json:long_caption=0.3."
            )
        key = match["key"]
        sources.append(CaptionSource("json" if key is not None else match["member"], key, weight))
    if not sources:
        raise UserError("data.captions is empty; name at least one source, for instance [txt].")
    if len({(source.member, source.key) for source in sources}) < len(sources):
        raise UserError(f"data.captions {entries} names a source twice; name each once.")
    return tuple(sources)


def _weight(text: str | None) -> float | None:
    try:
        weight = 1.0 if text is None else float(text)
    except ValueError:
        return None
    return weight if math.isfinite(weight) and 0 < weight <= 1e6 else None
