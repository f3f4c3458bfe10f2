"""Rows of local files, one after the other: JSON Lines, JSON, CSV and Parquet, each also gzipped."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from selective_dpo.errors import DataError

BATCH_ROWS = 1024

MAX_LINE = 64 << 20
"""Bytes of a JSON Lines row; characters of a line or a cell of CSV."""

MAX_WHOLE_FILE = 4 << 30
"""Bytes, unpacked, of a file that has to be read whole: a JSON array, or Parquet that is gzipped again."""

BATCH_BYTES = 64 << 20
"""Of Parquet that are unpacked at once, as far as its metadata tell."""


class Malformed(NamedTuple):
    """Stands in the place of a row that cannot be read."""

    problem: str


Row = Mapping[str, Any] | Malformed


class Format(NamedTuple):
    """How one kind of file is read."""

    rows: Callable[[Path], Iterator[Row]]
    row_count: Callable[[Path], int]


def read_file(path: Path) -> Iterator[Row]:
    """The rows of a file, in order. A line that does not parse is a `Malformed` row; blank lines are none.

    Raises:
        DataError: the format is unknown, or the file as a whole is damaged.
    """
    with damage_named(path):
        yield from _format_of(path).rows(path)


def count_file(path: Path) -> int:
    """How many rows `read_file` gives; no JSON is parsed for it, where lines or metadata tell."""
    with damage_named(path):
        return _format_of(path).row_count(path)


def rows_of_batch(batch: pa.RecordBatch | pa.Table) -> Iterator[Row]:
    """The rows of an Arrow batch; one that Python has no values for, such as text that is not UTF-8, is
    `Malformed`."""
    try:
        rows = batch.to_pylist()
    except Exception:  # dates beyond Python's years, names that stand twice ...: each with its own error
        rows = [_arrow_row(batch.slice(index, 1)) for index in range(batch.num_rows)]
    yield from rows


def _arrow_row(batch: pa.RecordBatch | pa.Table) -> Row:
    try:
        row: Row = batch.to_pylist()[0]
    except Exception as error:
        return Malformed(f"no value in Python: {error}")
    return row


def _json_lines(path: Path) -> Iterator[Row]:
    with _open(path) as stream:
        yield from (_json_row(line) for line in _lines(stream) if line.strip())


def _count_lines(path: Path) -> int:
    with _open(path) as stream:
        return sum(1 for line in _lines(stream) if line.strip())


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    # A few kilobytes of a .gz file can unpack to one line that no memory holds.
    number = 0
    while line := stream.readline(MAX_LINE):
        number += 1
        if len(line) == MAX_LINE and not line.endswith(b"\n"):
            raise ValueError(f"line {number:,} has more than {_size(MAX_LINE)}")
        yield line


def _json_row(line: bytes) -> Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Malformed(f"not JSON: {error}")
    return _object_row(value)


def _object_row(value: object) -> Row:
    return value if isinstance(value, dict) else Malformed(f"{type(value).__name__}, not an object")


def _json(path: Path) -> Iterator[Row]:
    # Much data called .json is JSON Lines. An array has to be read whole: prefer .jsonl for large data.
    with _open(path) as stream:
        if not _starts_array(stream):
            yield from _json_lines(path)
            return
        content = _read_whole(stream)
        try:
            values = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not a JSON array of rows: {error}") from error
    yield from map(_object_row, values)


def _read_whole(stream: IO[bytes]) -> bytes:
    content = stream.read(MAX_WHOLE_FILE + 1)
    if len(content) > MAX_WHOLE_FILE:
        raise ValueError(f"more than {_size(MAX_WHOLE_FILE)}, which would have to be read at once")
    return content


def _size(size: int) -> str:
    return f"{size >> 20:,} MiB" if size >= 1 << 20 else f"{size:,} bytes"


def _starts_array(stream: IO[bytes]) -> bool:
    while head := stream.read(BATCH_ROWS):
        text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
        if text:
            stream.seek(0)
            return text.startswith(b"[")
    return False


def _csv(path: Path) -> Iterator[Row]:
    # Bytes that are not UTF-8 become lone surrogates here, and the row is dropped with its reason later.
    # Cells are long texts: the csv module's default limit of 128 KiB does not suit them.
    default_limit = csv.field_size_limit(MAX_LINE)
    try:
        with (
            _open(path) as stream,
            io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="") as text,
        ):
            yield from map(_csv_row, csv.DictReader(_text_lines(text)))
    finally:
        csv.field_size_limit(default_limit)


def _text_lines(stream: io.TextIOWrapper) -> Iterator[str]:
    number = 0
    while line := stream.readline(MAX_LINE):
        number += 1
        if len(line) == MAX_LINE and not line.endswith(("\n", "\r")):
            raise ValueError(f"line {number:,} has more than {MAX_LINE:,} characters")
        yield line


def _csv_row(cells: dict[Any, Any]) -> Row:
    if None in cells:
        return Malformed("more cells than columns")
    return {column: _messages_cell(cell) for column, cell in cells.items()}


def _messages_cell(cell: str | None) -> object:
    if cell is None or not cell.lstrip().startswith("["):
        return cell
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    is_messages = isinstance(value, list) and all(isinstance(item, dict) and "role" in item for item in value)
    return value if is_messages else cell


def _parquet(path: Path) -> Iterator[Row]:
    with _parquet_file(path) as file:
        for group in range(file.metadata.num_row_groups):
            for batch in file.iter_batches(_batch_rows(file.metadata.row_group(group)), row_groups=[group]):
                yield from rows_of_batch(batch)


def _batch_rows(group: pq.RowGroupMetaData) -> int:
    """So many rows of a group that they unpack to some `BATCH_BYTES`."""
    row_bytes: int = group.total_byte_size // max(group.num_rows, 1)
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(row_bytes, 1)))


def _count_parquet(path: Path) -> int:
    with _parquet_file(path) as file:
        return int(file.metadata.num_rows)


@contextlib.contextmanager
def _parquet_file(path: Path) -> Iterator[pq.ParquetFile]:
    # Parquet is read from its end, so a gzipped one has to be unpacked first.
    if path.suffix.lower() != ".gz":
        with pq.ParquetFile(path) as file:
            yield file
        return
    with _open(path) as stream, pq.ParquetFile(pa.BufferReader(_read_whole(stream))) as file:
        yield file


def _open(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb"))


@contextlib.contextmanager
def damage_named(path: Path | str) -> Iterator[None]:
    """Say of whatever a library raises while it reads that `path` cannot be read.

    Raises:
        DataError: instead of the library's error.
    """
    try:
        yield
    except MemoryError as error:
        raise DataError(f"{path} cannot be read (memory ran out); split it, or its longest rows") from error
    except (OSError, EOFError, zlib.error, pa.ArrowException, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error}); check that it is complete") from error
    except (ValueError, LookupError, TypeError, ArithmeticError) as error:  # libraries, on damaged files
        raise DataError(f"{path} cannot be read ({error}); check that it is complete") from error


def _count_all(rows: Callable[[Path], Iterable[Row]]) -> Callable[[Path], int]:
    return lambda path: sum(1 for _ in rows(path))


def _format_of(path: Path) -> Format:
    name = path.name.lower().removesuffix(".gz")
    found = FORMATS.get(Path(name).suffix)
    if found is None:
        raise DataError(
            f"{path}: cannot tell its format; the name has to end in {', '.join(FORMATS)} (+ .gz)"
        )
    return found


FORMATS = {
    ".jsonl": Format(_json_lines, _count_lines),
    ".json": Format(_json, _count_all(_json)),
    ".csv": Format(_csv, _count_all(_csv)),
    ".parquet": Format(_parquet, _count_parquet),
}
