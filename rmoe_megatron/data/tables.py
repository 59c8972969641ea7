r"""Tables that name pictures: CSV, TSV, JSON lines, Parquet and Arrow as rows of typed values.

Text is what the file says: a byte-order mark is none of it, and a line ends at ``\n`` or ``\r\n`` alone. A column of CSV or TSV
whose values are all numbers has numbers, as in the other formats.
"""

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from rmoe_megatron.errors import UserError
from rmoe_megatron.regular_files import check_regular, read_bytes
from rmoe_megatron.typed_files import lines_of, parse_json

ROW = TypeAdapter(dict[str, Any])  # of JSON lines
MAX_BYTES = 1 << 34  # of a table that is text; Parquet is read in parts
MAX_FIELD = 1 << 24  # characters; Python's csv would stop at 2**17
# A number as JSON writes it: neither 007, which names something, nor nan.
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
        UserError: it cannot be read, or is no table of its kind.
    """
    return READERS[table.suffix](table)


def _text_of(table: Path) -> str:
    try:
        return read_bytes(table, MAX_BYTES, follow=True).decode("utf-8-sig")
    except ValueError as error:
        raise UserError(f"The table {table} cannot be read ({error}).") from error


def _read_json_lines(table: Path) -> Table:
    rows: list[Row] = [
        parse_json(line, ROW, f"Line {number} of {table}")
        for number, line in enumerate(lines_of(_text_of(table)), start=1)
        if line.strip()
    ]
    columns = dict.fromkeys(name for row in rows if not isinstance(row, str) for name in row)
    return Table(len(rows), list(columns), iter(rows))


def _read_csv(table: Path) -> Table:
    csv.field_size_limit(MAX_FIELD)
    text = _text_of(table)
    try:
        rows = list(csv.reader((f"{line}\n" for line in lines_of(text)), strict=True))
    except csv.Error as error:
        raise UserError(
            f"The table {table} cannot be read ({error}); is a quotation mark not closed?"
        ) from error
    return _with_header(rows)


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


def _with_header(rows: list[list[str]]) -> Table:
    rows = [row for row in rows if row]
    if not rows:
        return Table(0, [], iter(()))
    header, body = rows[0], rows[1:]
    whole = [row for row in body if len(row) == len(header)]
    numeric = {
        name
        for place, name in enumerate(header)
        if any(row[place] for row in whole)
        and all(not row[place] or NUMBER.fullmatch(row[place]) for row in whole)
    }

    def value(name: str, text: str) -> Any:
        if name not in numeric:
            return text
        return None if not text else float(text) if set(text) & set(".eE") else int(text)

    def typed() -> Iterator[Row]:
        for row in body:
            if len(row) != len(header):
                yield f"it has {len(row)} fields, and the header {len(header)}"
            else:
                yield {name: value(name, text) for name, text in zip(header, row, strict=True)}

    return Table(len(body), header, typed())


def _read_parquet(table: Path) -> Table:
    from pyarrow import ArrowException, parquet

    check_regular(table, follow=True)
    try:
        file = parquet.ParquetFile(table)
    except (OSError, ArrowException) as error:
        raise UserError(f"The table {table} cannot be read ({error}).") from error
    rows = (row for batch in file.iter_batches(batch_size=64) for row in batch.to_pylist())
    return Table(file.metadata.num_rows, file.schema_arrow.names, rows)


def _read_arrow(table: Path) -> Table:
    """Read what the Hugging Face libraries save: a stream of record batches; or a file of them."""
    from pyarrow import ArrowException, ipc, memory_map

    check_regular(table, follow=True)
    try:
        with memory_map(str(table)) as content:
            is_file = content.read(6) == b"ARROW1"
            content.seek(0)
            batches = ipc.open_file(content).read_all() if is_file else ipc.open_stream(content).read_all()
    except (OSError, ArrowException) as error:
        raise UserError(f"The table {table} cannot be read ({error}).") from error
    rows = (row for batch in batches.to_batches(max_chunksize=64) for row in batch.to_pylist())
    return Table(batches.num_rows, batches.schema.names, rows)


READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
