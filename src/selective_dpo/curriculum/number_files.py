"""Files of ids and numbers: the original's records without a header, and any table with named columns."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from selective_dpo.core.records import LARGEST_LOSS
from selective_dpo.curriculum.arrow_columns import require_plain
from selective_dpo.errors import DataError, IdentityError

MOST_BYTES = 1 << 30
"""Of a file, unpacked: some 25 million rows."""
_PIECE = 16 << 20


class Columns(NamedTuple):
    """Which two columns of a file are read."""

    id: str
    number: str


_RECORDS = Columns("id", "loss")
"""What the two columns of a file without a header are called here."""


class Numbers(NamedTuple):
    """The rows of a file, in its order; blank lines are left out."""

    ids: pa.Array
    values_N: NDArray[np.float64]


def read_records(path: Path) -> Numbers:
    """Read a CSV of prompt ids and losses without a header, plain or gzipped (`.gz`).

    Raises:
        DataError: it cannot be read, is empty, or has a line that is not an id and a finite number;
            the line is named.
    """
    return _numbers(path, _csv_table(path, _text(path), _RECORDS, has_header=False), first_line=1)


def read_columns(path: Path, choose: Callable[[list[str]], Columns]) -> tuple[Columns, Numbers]:
    """Read two columns of a Parquet file, or of a CSV with a header, plain or gzipped.

    `choose` is given the names of all columns, and says which two are read.

    Raises:
        DataError: as `read_records`; or a column is not there, or twice.
    """
    is_parquet = ".parquet" in path.suffixes[-2:]
    if is_parquet:
        columns, table = _parquet_table(path, choose)
    else:
        content = _text(path)
        columns = _each_once(path, _header(path, content), choose)
        table = _csv_table(path, content, columns, has_header=True)
    return columns, _numbers(path, table, first_line=1 if is_parquet else 2)


def _numbers(path: Path, table: pa.Table, *, first_line: int) -> Numbers:
    """The rows of two columns of text, named id and loss (or number)."""
    id_column, number_column = table.columns
    texts = pc.utf8_trim_whitespace(number_column)
    has_id = pc.not_equal(id_column, "")
    is_row_N = np.asarray(pc.or_(has_id, pc.not_equal(texts, "")))
    texts = pc.if_else(pa.array(is_row_N), texts, "0")
    try:
        values_N = texts.cast(pa.float64()).to_numpy()
    except pa.ArrowInvalid:
        row = next((row for row, text in enumerate(texts) if not _is_number(text)), 0)
        raise _bad_row(path, row + first_line, texts[row], table) from None
    bad_N = is_row_N & ~(np.asarray(has_id) & (np.abs(values_N) <= LARGEST_LOSS))
    if bad_N.any():
        row = int(np.argmax(bad_N))
        raise _bad_row(path, row + first_line, texts[row], table)
    if not is_row_N.any():
        raise DataError(f"{path} has no rows")
    ids = id_column.combine_chunks().filter(pa.array(is_row_N))
    try:
        require_plain(ids, what=f"{path}: ids")
    except IdentityError as error:
        raise DataError(str(error)) from error
    return Numbers(ids, values_N[is_row_N])


def _text(path: Path) -> bytes:
    """A file, unpacked; UTF-8."""
    content = _unpacked(path)
    # Arrow cannot hand over a wrong row that is not text: it would be left out without a word.
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} line {line} is not UTF-8 text; save it as UTF-8") from error
    return content


def _header(path: Path, content: bytes) -> list[str]:
    try:
        return next(csv.reader(io.StringIO(content.decode("utf-8-sig"))), [])
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as CSV: {error}") from error


def _each_once(path: Path, names: list[str], choose: Callable[[list[str]], Columns]) -> Columns:
    columns = choose(names)
    if any(names.count(name) != 1 for name in columns) or columns.id == columns.number:
        raise DataError(f"{path} does not hold columns {columns.id!r} and {columns.number!r}, each once")
    return columns


def _csv_table(path: Path, content: bytes, columns: Columns, *, has_header: bool) -> pa.Table:
    """Both columns as text, so that whatever is wrong with them can be shown."""
    wrong: list[pyarrow.csv.InvalidRow] = []

    def note(row: pyarrow.csv.InvalidRow) -> str:
        wrong.append(row)
        return "skip"

    try:
        with pa.BufferReader(content) as stream:
            table = pyarrow.csv.read_csv(
                stream,
                # One thread, because only then rows know their number.
                pyarrow.csv.ReadOptions(
                    column_names=None if has_header else list(columns), use_threads=False
                ),
                pyarrow.csv.ParseOptions(invalid_row_handler=note, ignore_empty_lines=False),
                pyarrow.csv.ConvertOptions(
                    include_columns=list(columns),
                    column_types=dict.fromkeys(columns, pa.string()),
                    strings_can_be_null=False,
                ),
            )
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as CSV: {error}") from error
    if wrong:
        row = wrong[0]
        of = "" if has_header else f" ({', '.join(columns)})"
        raise DataError(
            f"{path} line {row.number}: {row.actual_columns} column(s) instead of {row.expected_columns}{of}"
        )
    return table


def _parquet_table(path: Path, choose: Callable[[list[str]], Columns]) -> tuple[Columns, pa.Table]:
    """Both columns as text, like those of a CSV."""
    source = pa.BufferReader(_unpacked(path)) if path.suffix == ".gz" else path
    try:
        with pq.ParquetFile(source) as file:
            columns = _each_once(path, file.schema_arrow.names, choose)
            table = file.read(columns=list(columns))
        values = table[columns.number]
        # A float32 as the float64 that it is, not as its own shortest text.
        values = values.cast(pa.float64()) if pa.types.is_floating(values.type) else values
        texts = [pc.fill_null(column.cast(pa.string()), "") for column in (table[columns.id], values)]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error
    return columns, pa.table(dict(zip(columns, texts, strict=True)))


def _unpacked(path: Path) -> bytes:
    # In pieces: a small .gz can unpack to more than any memory holds.
    pieces: list[bytes] = []
    size = 0
    try:
        with pa.input_stream(str(path), compression="detect") as stream:
            while piece := stream.read(_PIECE):
                pieces.append(piece)
                size += len(piece)
                if size > MOST_BYTES:
                    raise DataError(
                        f"{path} has more than {MOST_BYTES >> 20:,} MiB; is it a file of records?"
                    )
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as CSV: {error}") from error
    return b"".join(pieces)


def _bad_row(path: Path, line: int, number: pa.Scalar, table: pa.Table) -> DataError:
    columns = Columns(*table.column_names)
    header = " (and no header)" if columns == _RECORDS else ""
    return DataError(
        f"{path} line {line}: need an id and a finite {columns.number}{header}; "
        f"the {columns.number} is {number.as_py()!r}"
    )


def _is_number(text: pa.Scalar) -> bool:
    try:
        text.cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return True
