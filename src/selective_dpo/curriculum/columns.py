"""Arrow columns of ids as NumPy arrays and back, without a Python string for each row."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from selective_dpo.errors import IdentityError, name_some
from selective_dpo.identity import MAX_ID_BYTES, positions_of


def text_array(column: pa.Array | pa.ChunkedArray) -> NDArray[np.str_]:
    """Strings without nulls as a NumPy array of the width of the longest.

    Raises:
        IdentityError: as `require_plain`.
    """
    require_plain(column, what="ids")
    width = pc.max(pc.binary_length(column)).as_py() or 1
    if not pc.all(pc.string_is_ascii(column), min_count=0).as_py():
        return np.asarray(column.to_pylist(), dtype=np.str_)
    # Padded with NUL, which NumPy leaves out, all are of one width, and their bytes are NumPy's.
    padded = pc.ascii_rpad(column, width, "\0").cast(pa.binary()).cast(pa.binary(width))
    chunks = padded.chunks if isinstance(padded, pa.ChunkedArray) else [padded]
    letters = [np.frombuffer(chunk.buffers()[1], f"S{width}", len(chunk)) for chunk in chunks if len(chunk)]
    return np.concatenate([np.empty(0, f"S{width}"), *letters]).astype(np.str_)


def require_plain(column: pa.Array | pa.ChunkedArray, *, what: str) -> None:
    """Check that texts can be ids: NumPy drops NUL characters at their ends and pads all to the longest.

    Raises:
        IdentityError: one is null, holds a NUL character, is too long or is not UTF-8; `what` names them.
    """
    wrong = pc.fill_null(
        pc.or_(pc.match_substring(column, "\0"), pc.greater(pc.binary_length(column), MAX_ID_BYTES)), True
    )
    count = pc.sum(wrong).as_py() or 0
    if count:
        shown = [str(text)[:40] for text in column.filter(wrong).cast(pa.binary()).to_pylist()[:5]]
        raise IdentityError(
            f"{what}: {count:,} are missing, hold a NUL character or have more than {MAX_ID_BYTES} bytes: "
            f"{name_some(shown)}"
        )
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        raise IdentityError(f"{what} are not all UTF-8 text ({error})") from error


def codes(column: pa.Array | pa.ChunkedArray) -> tuple[NDArray[np.int32], pa.Array]:
    """For each row the index of its value among the distinct ones, which come in order of appearance."""
    coded = pc.dictionary_encode(column)
    if isinstance(coded, pa.ChunkedArray):
        if not coded.num_chunks:
            return np.empty(0, dtype=np.int32), pa.array([], type=column.type)
        coded = coded.unify_dictionaries().combine_chunks()
    return coded.indices.to_numpy(), coded.dictionary


def first_rows(code_N: NDArray[np.int32], distinct: int) -> NDArray[np.int64]:
    """The first row of each of `distinct` codes."""
    first_D = np.empty(distinct, dtype=np.int64)
    # Of several values written to one place the last one stays, so rows are written from the last on.
    first_D[code_N[::-1]] = np.arange(len(code_N) - 1, -1, -1)
    return first_D


def id_positions(wanted: pa.ChunkedArray, available: pa.ChunkedArray, *, what: str) -> NDArray[np.int64]:
    """Where each of `wanted` stands in `available`: `identity.positions_of` for columns of ids.

    Raises:
        IdentityError: an id is wanted but not available, or stands twice in either column.
    """
    where = pc.index_in(wanted, value_set=available)
    is_one_to_one = not where.null_count and all(
        pc.count_distinct(ids, mode="all").as_py() == len(ids) for ids in (wanted, available)
    )
    if not is_one_to_one:  # which names the ids that are wrong
        return positions_of(wanted.to_pylist(), available.to_pylist(), what=what)
    return np.asarray(where.to_numpy(), dtype=np.int64)
