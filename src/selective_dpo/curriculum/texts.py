"""The texts of the selected pairs in training order, however many: put in order on disk, not in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from selective_dpo.curriculum.table import Curriculum
from selective_dpo.errors import IdentityError, name_some

TEXTS = ("prompt", "chosen", "rejected")
KEPT = "kept"
_FEWEST_IN_PART = 20_000
_MOST_PARTS = 200
_ROWS_AT_ONCE = 10_000

Pairs: TypeAlias = pa.Table | Path
"""Rows as in `pairs.parquet`: as a table, or the file."""


@contextmanager
def selected_texts(curriculum: Curriculum, pairs: Pairs, scratch: Path) -> Iterator[Iterator[pa.Table]]:
    """Tables of `pair_id`, `prompt_id`, `difficulty` and the texts (as JSON), in training order.

    One pass over `pairs` deals the texts out to files below `scratch`, one for each stretch of the order;
    then stretch after stretch is read and sorted.

    Raises:
        IdentityError: selected pairs are not in `pairs`.
    """
    ordered = _in_training_order(curriculum)
    place_R = _places(ordered["pair_id"], pairs)
    size = max(_FEWEST_IN_PART, -(-len(ordered) // _MOST_PARTS))
    with tempfile.TemporaryDirectory(prefix=".partial-texts-", dir=scratch) as name:
        parts = [Path(name) / f"{start}.arrow" for start in range(0, len(ordered), size)]
        _deal(pairs, place_R, parts, size)
        yield (_with_texts(ordered.slice(number * size, size), part) for number, part in enumerate(parts))


def _in_training_order(curriculum: Curriculum) -> pa.Table:
    table = curriculum.table.select(["pair_id", "prompt_id", "difficulty", "position"])
    chosen = table.filter(pc.greater_equal(table["position"], 0))
    return chosen.sort_by("position").drop_columns(["position"])


def _places(ordered_ids: pa.ChunkedArray, pairs: Pairs) -> NDArray[np.int64]:
    """For each row of `pairs` its place in the training order, -1 for rows that are not used."""
    rows = pa.concat_tables(pa.table(batch) for batch in _batches(pairs, ("pair_id", "status")))
    kept_rows = np.flatnonzero(np.asarray(pc.equal(rows["status"], KEPT)))
    where = pc.index_in(ordered_ids, value_set=rows["pair_id"].take(pa.array(kept_rows)))
    if where.null_count:
        absent = ordered_ids.filter(pc.is_null(where)).to_pylist()
        raise IdentityError(
            f"{len(absent):,} of {len(ordered_ids):,} selected pairs are not among these pairs: "
            f"{name_some(absent)}; pass the pairs that the curriculum was made from"
        )
    place_R = np.full(len(rows), -1, dtype=np.int64)
    place_R[kept_rows[where.to_numpy()]] = np.arange(len(ordered_ids))
    return place_R


def _deal(pairs: Pairs, place_R: NDArray[np.int64], parts: list[Path], size: int) -> None:
    schema = pa.schema([("place", pa.int64()), *((name, pa.string()) for name in TEXTS)])
    with ExitStack() as stack:
        writers = [stack.enter_context(pa.ipc.new_file(str(part), schema)) for part in parts]
        row = 0
        for batch in _batches(pairs, TEXTS):
            place_N = place_R[row : row + len(batch)]
            row += len(batch)
            used = np.flatnonzero(place_N >= 0)
            # Sorted by part, the rows of each part stand together.
            used = used[np.argsort(place_N[used] // size, kind="stable")]
            numbers, starts = np.unique(place_N[used] // size, return_index=True)
            for number, rows in zip(numbers, np.split(used, starts)[1:], strict=True):
                texts = batch.take(pa.array(rows))
                columns = [pa.array(place_N[rows]), *(texts[name] for name in TEXTS)]
                writers[number].write_batch(pa.record_batch(columns, schema=schema))


def _with_texts(ordered: pa.Table, part: Path) -> pa.Table:
    with pa.memory_map(str(part)) as source:
        texts = pa.ipc.open_file(source).read_all().sort_by("place")
        for name in TEXTS:
            ordered = ordered.append_column(name, texts[name])
        return ordered


def _batches(pairs: Pairs, columns: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    if isinstance(pairs, pa.Table):
        yield from pairs.select(columns).to_batches(max_chunksize=_ROWS_AT_ONCE)
        return
    with pq.ParquetFile(pairs) as file:
        yield from file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=list(columns))
