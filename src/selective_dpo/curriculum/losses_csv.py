"""One CSV of the original repository: rows of prompt id and loss, without a header."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import NDArray

from selective_dpo.core.records import LARGEST_LOSS
from selective_dpo.curriculum.arrow_columns import require_plain
from selective_dpo.errors import DataError, IdentityError

MOST_BYTES = 1 << 30
"""Of a file, unpacked: some 25 million rows."""
_PIECE = 16 << 20
_COLUMNS = {"id": pa.string(), "loss": pa.string()}


class Losses(NamedTuple):
    """The rows of a file, in its order; blank lines are left out."""

    ids: pa.Array
    losses_N: NDArray[np.float64]


def read_losses(path: Path) -> Losses:
    """Read a file, plain or gzipped (`.gz`).

    Raises:
        DataError: it cannot be read, is empty, or has a line that is not an id and a finite number;
            the line is named.
    """
    table = _read_text(path)
    texts = pc.utf8_trim_whitespace(table["loss"])
    has_id = pc.not_equal(table["id"], "")
    is_row_N = np.asarray(pc.or_(has_id, pc.not_equal(texts, "")))
    texts = pc.if_else(pa.array(is_row_N), texts, "0")
    try:
        losses_N = texts.cast(pa.float64()).to_numpy()
    except pa.ArrowInvalid:
        row = next((row for row, text in enumerate(texts) if not _is_number(text)), 0)
        raise _bad_row(path, row, texts[row]) from None
    bad_N = is_row_N & ~(np.asarray(has_id) & (np.abs(losses_N) <= LARGEST_LOSS))
    if bad_N.any():
        row = int(np.argmax(bad_N))
        raise _bad_row(path, row, texts[row])
    if not is_row_N.any():
        raise DataError(f"{path} has no rows")
    ids = table["id"].combine_chunks().filter(pa.array(is_row_N))
    try:
        require_plain(ids, what=f"{path}: ids")
    except IdentityError as error:
        raise DataError(str(error)) from error
    return Losses(ids, losses_N[is_row_N])


def _read_text(path: Path) -> pa.Table:
    """Both columns as text, so that whatever is wrong with them can be shown."""
    wrong: list[tuple[int, int]] = []

    def note(row: pyarrow.csv.InvalidRow) -> str:
        wrong.append((row.number, row.actual_columns))
        return "skip"

    csv = pyarrow.csv
    try:
        with pa.input_stream(str(path), compression="detect") as stream:
            content = _read_whole(stream, path)
        _require_utf8(content, path)
        with pa.BufferReader(content) as stream:
            table = csv.read_csv(
                stream,
                # One thread, because only then rows know their number.
                csv.ReadOptions(column_names=list(_COLUMNS), use_threads=False),
                csv.ParseOptions(invalid_row_handler=note, ignore_empty_lines=False),
                csv.ConvertOptions(column_types=_COLUMNS, strings_can_be_null=False),
            )
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as CSV: {error}") from error
    if wrong:
        line, columns = wrong[0]
        raise DataError(f"{path} line {line}: {columns} column(s) instead of 2 (id, loss)")
    return table


def _read_whole(stream: pa.NativeFile, path: Path) -> bytes:
    # In pieces: a small .gz can unpack to more than any memory holds.
    pieces: list[bytes] = []
    size = 0
    while piece := stream.read(_PIECE):
        pieces.append(piece)
        size += len(piece)
        if size > MOST_BYTES:
            raise DataError(f"{path} has more than {MOST_BYTES >> 20:,} MiB; is it a file of records?")
    return b"".join(pieces)


def _require_utf8(content: bytes, path: Path) -> None:
    # Arrow cannot hand over a wrong row that is not text: it would be left out without a word.
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} line {line} is not UTF-8 text; save it as UTF-8") from error


def _bad_row(path: Path, row: int, loss: pa.Scalar) -> DataError:
    return DataError(
        f"{path} line {row + 1}: need an id and a finite loss (and no header); the loss is {loss.as_py()!r}"
    )


def _is_number(text: pa.Scalar) -> bool:
    try:
        text.cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return True
