"""Parquet and Arrow tables as rows of Python's values, read with pyarrow in parts."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rmoe_megatron.errors import UserError
from rmoe_megatron.files.regular import check_regular

ROWS = 64  # that are Python's values at a time: they may hold pictures
type Opened = tuple[int, list[str], Iterator[dict[str, Any]]]  # number of rows, names of columns, rows


class Unheld:
    """A value that Python's types do not hold, such as a time in nanoseconds or of the year 300,000.

    Attributes:
        kind: the type of its column, in Arrow's words.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind


def open_parquet(table: Path) -> Opened:
    """Open a Parquet file.

    Raises:
        UserError: it cannot be read, or while rows are taken: a part of it cannot.
    """
    from pyarrow import parquet

    check_regular(table, follow=True)
    with _refused(table):
        file = parquet.ParquetFile(table)
    return file.metadata.num_rows, file.schema_arrow.names, _rows(file.iter_batches(batch_size=ROWS), table)


def open_arrow(table: Path) -> Opened:
    """Open what the Hugging Face libraries save: a stream of record batches; or a file of them, as Feather is.

    Raises:
        UserError: it cannot be read.
    """
    from pyarrow import ipc, memory_map

    check_regular(table, follow=True)
    with _refused(table), memory_map(str(table)) as content:
        is_file = content.read(6) == b"ARROW1"
        content.seek(0)
        batches = ipc.open_file(content).read_all() if is_file else ipc.open_stream(content).read_all()
    return batches.num_rows, batches.schema.names, _rows(batches.to_batches(max_chunksize=ROWS), table)


@contextmanager
def _refused(table: Path) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except (OSError, ArrowException) as error:
        raise UserError(f"The table {table} cannot be read ({error}).") from error


def _rows(batches: Iterable[Any], table: Path) -> Iterator[dict[str, Any]]:
    remaining = iter(batches)
    while True:
        with _refused(table):  # a damaged part is found when it is read
            batch = next(remaining, None)
        if batch is None:
            return
        columns = [_values(column) for column in batch.columns]
        names = batch.schema.names
        yield from (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))


def _values(column: Any) -> list[Any]:
    """Return a column's values; one that Python's types do not hold costs itself alone."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):  # ArrowInvalid is a ValueError
        return [_value(each) for each in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error.object  # the bytes of what should be text
    except (ValueError, OverflowError):
        return Unheld(str(scalar.type))
