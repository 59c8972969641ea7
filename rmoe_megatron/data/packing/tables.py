r"""Tables that name pictures: CSV, TSV, JSON lines, Parquet and Arrow as rows of typed values.

Text is what the file says: a byte-order mark is none of it, and a line ends at ``\n`` or ``\r\n`` alone (at ``\r`` in a file that has
no other end). A column of CSV or TSV whose values are all numbers has numbers, as in the other formats.
"""

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from rmoe_megatron.data.packing.arrow_tables import open_arrow, open_parquet
from rmoe_megatron.data.shards.archive import COMPRESSED
from rmoe_megatron.data.shards.decoding import decode_text
from rmoe_megatron.errors import UserError
from rmoe_megatron.files.regular import read_bytes
from rmoe_megatron.files.untrusted import lines_of, parse_json

ROW = TypeAdapter(dict[str, Any])  # of JSON lines
MAX_BYTES = 1 << 34  # of a table that is text; Parquet is read in parts
MAX_FIELD = 1 << 24  # characters; Python's csv would stop at 2**17
# A number as JSON writes it: neither 007, which names something, nor nan.
DECIMAL_COMMA = re.compile(r"(-?[0-9]+),([0-9]+)")
SEPARATOR_LINE = re.compile(r"sep=([,;\t|])\s*")  # Excel's own, before the header
DELIMITERS = (";", "\t", "|")  # of files that are called CSV, beside the comma
# How files begin that are called a table and are none.
NO_TEXT = COMPRESSED | {
    b"PK\3\4": "it is a ZIP archive, as Excel's workbooks are; save the sheet as CSV UTF-8",
}
NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,40})?([eE][+-]?[0-9]{1,3})?")
QUOTED = re.compile(r'"((?:[^"]|"")*)"')

# A row by columns, or why it is none.
Row = dict[str, Any] | str


@dataclass(frozen=True)
class Table:
    """A table that has been opened.

    Attributes:
        count: how many rows there are.
        columns: their names.
        rows: to be taken once.
    """

    count: int
    columns: list[str]
    rows: Iterator[Row]


def read_table(table: Path) -> Table:
    """Open a table.

    Raises:
        UserError: it cannot be read, is no table of its kind, or has two columns of one name.
    """
    opened = READERS[table.suffix.lower()](table)
    twice = next((name for name in opened.columns if opened.columns.count(name) > 1), None)
    if twice is not None:
        raise UserError(
            f"{table} has the column {twice} twice, so that it is not clear which is meant; rename one."
        )
    return opened


def is_table(path: Path) -> bool:
    """Whether a file is called like a table."""
    return path.suffix.lower() in READERS


def _text_of(table: Path) -> str:
    content = read_bytes(table, MAX_BYTES, follow=True)
    kind = next((said for mark, said in NO_TEXT.items() if content.startswith(mark)), None)
    try:
        text = decode_text(content) if kind is None else ""
    except ValueError as error:
        kind = f"{error}; save it as UTF-8, which Excel calls CSV UTF-8"
    if kind is not None:
        raise UserError(f"The table {table} cannot be read: {kind}.")
    return (
        text if "\n" in text else text.replace("\r", "\n")
    )  # of a Mac of before 2001, and of Excel's "CSV (Macintosh)"


def _read_json_lines(table: Path) -> Table:
    rows: list[Row] = [
        parse_json(line, ROW, f"Line {number} of {table}", allow_infinite=True)
        for number, line in enumerate(lines_of(_text_of(table)), start=1)
        if line.strip()
    ]
    columns = dict.fromkeys(name for row in rows if not isinstance(row, str) for name in row)
    return Table(len(rows), list(columns), iter(rows))


def _read_csv(table: Path) -> Table:
    csv.field_size_limit(MAX_FIELD)
    lines = lines_of(_text_of(table))
    delimiter = _delimiter_of(lines)
    try:
        rows = list(csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise UserError(
            f"The table {table} cannot be read ({error}); is a quotation mark not closed?"
        ) from error
    return _with_header(rows, has_decimal_comma=delimiter == ";")


def _delimiter_of(lines: list[str]) -> str:
    """Return what parts the fields: in half of the world Excel writes semicolons. A line that only says it is removed."""
    first = next((number for number, line in enumerate(lines) if line.strip()), None)
    if first is None:
        return ","
    if found := SEPARATOR_LINE.fullmatch(lines[first]):
        del lines[: first + 1]
        return found[1]
    header = lines[first]
    return next((each for each in DELIMITERS if each in header and "," not in header), ",")


def _read_tsv(table: Path) -> Table:
    """Read a table whose fields tabs part.

    Such a table has no quoting: a quotation mark is a character of the text. Programs that know CSV alone write some all the same,
    around every field, or around one that holds a quotation mark (doubled then), a tab or a line break.
    """
    lines = [line for line in lines_of(_text_of(table)) if line]
    rows = [line.split("\t") for line in lines]
    header = rows[0] if rows else []
    if header and not all(map(QUOTED.fullmatch, header)) and all(len(row) == len(header) for row in rows):
        return _with_header([[_unquoted(field) for field in row] for row in rows])
    try:
        csv.field_size_limit(MAX_FIELD)
        quoted = list(csv.reader((f"{line}\n" for line in lines), delimiter="\t", strict=True))
    except csv.Error:
        quoted = []
    if quoted and all(len(row) == len(quoted[0]) for row in quoted):
        return _with_header(quoted)
    return _with_header(rows)


def _unquoted(field: str) -> str:
    """Return a field without its quotation marks if a program has put them there: it then had to double those inside."""
    found = QUOTED.fullmatch(field)
    return found[1].replace('""', '"') if found is not None and '""' in found[1] else field


def _with_header(rows: list[list[str]], has_decimal_comma: bool = False) -> Table:
    rows = [row for row in rows if row]
    if not rows:
        return Table(0, [], iter(()))
    body, whole = rows[1:], [row for row in rows[1:] if len(row) == len(rows[0])]
    # A column without a name: the row numbers of pandas, or nothing behind a last comma.
    names = [name.strip() or f"column {place + 1}" for place, name in enumerate(rows[0])]
    kept = [place for place, name in enumerate(rows[0]) if name.strip() or any(row[place] for row in whole)]

    def plain(text: str) -> str:
        return (
            DECIMAL_COMMA.sub(r"\1.\2", text) if has_decimal_comma and DECIMAL_COMMA.fullmatch(text) else text
        )

    numeric = {
        place
        for place in kept
        if any(row[place] for row in whole)
        and all(not row[place] or NUMBER.fullmatch(plain(row[place])) for row in whole)
    }

    def value(place: int, text: str) -> Any:
        if place not in numeric:
            return text
        number = plain(text)
        return None if not text else float(number) if set(number) & set(".eE") else int(number)

    def typed() -> Iterator[Row]:
        for row in body:
            if len(row) != len(names):
                yield f"it has {len(row)} fields, and the header {len(names)}"
            else:
                yield {names[place]: value(place, row[place]) for place in kept}

    return Table(len(body), [names[place] for place in kept], typed())


def _read_parquet(table: Path) -> Table:
    return Table(*open_parquet(table))


def _read_arrow(table: Path) -> Table:
    return Table(*open_arrow(table))


READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".feather": _read_arrow,
}
