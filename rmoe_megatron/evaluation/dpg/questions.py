"""DPG-Bench's prompts and the questions about them, read from its table."""

import csv
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.rule_set import RuleSet
from rmoe_megatron.files.regular import read_bytes
from rmoe_megatron.files.untrusted import lines_of, read_text

NUM_PROMPTS = 1065  # of the published set
PUBLISHED_BLOB = (
    "98457fc9901943f51ff9a30367250fc292533bed"  # dpg_bench/dpg_bench.csv in github.com/TencentQQGYLab/ELLA
)
MAX_BYTES = 1 << 27
COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
# It names a file.
_ITEM = re.compile(r"[\w-][\w.-]{0,127}")


@dataclass(frozen=True)
class Proposition:
    """A question, its category as ``broad - detailed``, and the propositions that have to be true for it to be asked."""

    question: str
    category: str
    parents: tuple[int, ...]


@dataclass(frozen=True)
class Item:
    """A prompt with its propositions by number, in the order of the table."""

    name: str
    prompt: str
    propositions: dict[int, Proposition] = field(default_factory=dict)


def read_items(path: Path, protocol: RuleSet) -> list[Item]:
    """Return the items of ``dpg_bench.csv``, as ``protocol`` reads them.

    The official code leaves the first row out, and of an item whose rows don't follow each other it keeps the last block alone.

    Raises:
        UserError: the file cannot be read, lacks a column, or a row is malformed; names it. Or all items are numbers, of which the
            official code scores none.
    """
    reader = csv.DictReader(f"{line}\n" for line in lines_of(read_text(path, MAX_BYTES, follow=True)))
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
    if missing:
        raise UserError(f"{path} has no column {missing[0]}; give DPG-Bench's dpg_bench.csv.")
    items: dict[str, Item] = {}
    previous = None
    for number, row in enumerate(reader):
        where = f"Row {number + 1} of {path}"
        name = row["item_id"] or ""
        if _ITEM.fullmatch(name) is None:
            raise UserError(f"{where} has the item {name!r:.60}, which can name no image.")
        item = items.setdefault(name, Item(name, row["text"] or ""))
        if protocol is RuleSet.official:
            if number == 0:
                continue
            if name != previous:
                item.propositions.clear()
            previous = name
        identity = _numbers(row["proposition_id"], where, "proposition_id")[0]
        parents = tuple(parent for parent in _numbers(row["dependency"], where, "dependency") if parent != 0)
        category = (row["tuple"] or "").partition("(")[0].strip()
        item.propositions[identity] = Proposition(row["question_natural_language"] or "", category, parents)
    found = [item for item in items.values() if item.propositions]
    if not found:
        raise UserError(f"{path} has no row; give DPG-Bench's dpg_bench.csv.")
    if protocol is RuleSet.official and all(_is_number(name) for name in items):
        raise UserError(
            f"Every item_id of {path} is a number; the published code reads such a column as numbers, finds none of the pictures by "
            "their names and scores nothing. Give --protocol fixed, or name the items otherwise."
        )
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def is_published(path: Path) -> bool:
    """Whether a table is the published one, byte for byte."""
    content = read_bytes(path, MAX_BYTES, follow=True)
    # As git names what it holds; SHA-1 is its choice, and no secret hangs on it.
    named = hashlib.sha1(b"blob %d\0%b" % (len(content), content), usedforsecurity=False)
    return named.hexdigest() == PUBLISHED_BLOB


def _numbers(text: str | None, where: str, column: str) -> list[int]:
    try:
        numbers = [int(part) for part in (text or "").split(",")]
    except ValueError as error:
        raise UserError(
            f"{where} has {column} {text!r:.60}, which is no list of numbers; get the file again."
        ) from error
    return numbers
