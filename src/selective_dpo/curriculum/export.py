"""A curriculum in other programs' formats."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from selective_dpo.curriculum.table import Curriculum, loss_column
from selective_dpo.errors import ConfigError, DataError, IdentityError, name_some
from selective_dpo.storage.artifacts import publish_folder, replacing

Format = Literal["csv", "parquet", "jsonl", "datasets"]

_MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))

_ROWS_AT_ONCE = 10_000


def export_curriculum(
    curriculum: Curriculum,
    path: str | Path,
    format: Format,
    *,
    pairs: Pairs | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the curriculum to `path`, whole or not at all, and return it.

    - `csv`: every pair with a difficulty, in the columns of the original repository: `prompt_id`,
      `loss_step00_seed41` ..., `learning_order` (the mean loss, or the difficulty that was imported); then
      `difficulty`, where another criterion makes it, and `pair_id`, where it differs;
    - `parquet`: every scored pair, the table as it is;
    - `jsonl`: the selected pairs in training order: ids, difficulty, prompt, chosen, rejected;
    - `datasets`: the same as a folder for `datasets.load_from_disk`, in the columns TRL reads.

    `pairs` is the run's `pairs.parquet` or its table (`data.store`), whose texts the last two need; they are
    streamed, so that memory holds only some of them.

    Raises:
        ConfigError: `path` exists and `overwrite` is off, the format is unknown, or `pairs` is missing.
        IdentityError: selected pairs are not in `pairs`.
        DataError: `datasets` cannot hold the pairs: some are text, some messages.
    """
    path = Path(path)
    if format not in ("csv", "parquet", "jsonl", "datasets"):
        raise ConfigError(f"unknown format '{format}': use csv, parquet, jsonl or datasets")
    _require_free(path, overwrite=overwrite, is_folder=format == "datasets")
    if format == "csv":
        _write_csv(_original_columns(curriculum), path)
    elif format == "parquet":
        with replacing(path) as partial:
            pq.write_table(curriculum.table, partial)
    else:
        _write_texts(curriculum, path, format, pairs)
    return path


def _write_texts(curriculum: Curriculum, path: Path, format: str, pairs: Pairs | None) -> None:
    if pairs is None:
        raise ConfigError(
            f"format '{format}' needs the pairs' texts: pass --pairs with the run's pairs folder, "
            "or export csv or parquet"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with selected_texts(curriculum, pairs, scratch=path.parent) as tables:
        if format == "jsonl":
            _write_jsonl(tables, path)
        else:
            _write_dataset(tables, path, key=curriculum.order_digest)


def _require_free(path: Path, *, overwrite: bool, is_folder: bool) -> None:
    if not path.exists():
        return
    if not overwrite:
        raise ConfigError(f"{path} exists: choose another path, or pass --overwrite to replace it")
    # A folder is replaced with all it holds, so only one that an export made may be.
    is_ours = (path / "dataset_info.json").is_file() if is_folder else path.is_file()
    if not is_ours:
        raise ConfigError(
            f"{path} is not an exported {'data set' if is_folder else 'file'}: choose another path"
        )


def _original_columns(curriculum: Curriculum) -> pa.Table:
    table, facts = curriculum.measured.table, curriculum.facts
    # The original counts evaluations from 0 and calls them steps.
    losses = {
        f"loss_step{evaluation - 1:02d}_seed{seed}": table[loss_column(seed, evaluation)]
        for seed in facts["seeds"]
        for evaluation in facts["evaluations"]
    }
    columns: dict[str, Any] = {
        "prompt_id": table["prompt_id"],
        **losses,
        "learning_order": _means(list(losses.values())) if losses else table["difficulty"],
    }
    if (facts.get("select") or {}).get("aggregate", "mean") != "mean":
        columns["difficulty"] = table["difficulty"]
    if table["pair_id"] != table["prompt_id"]:
        columns["pair_id"] = table["pair_id"]
    return pa.table(columns)


def _means(columns: Sequence[pa.ChunkedArray]) -> pa.Array:
    """Of the losses that each pair has."""
    total_P = np.zeros(len(columns[0]))
    held_P = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        total_P += pc.fill_null(column, 0.0).to_numpy()
        held_P += np.asarray(column.is_valid())
    has_none_P = held_P == 0
    return pa.array(total_P / np.where(has_none_P, 1, held_P), mask=has_none_P)


def _write_csv(table: pa.Table, path: Path) -> None:
    ids = [table[name] for name in ("prompt_id", "pair_id") if name in table.column_names]
    # The original writes bare ids; quotes only where a data set's own ids need them.
    needs_quotes = any(pc.any(pc.match_substring_regex(column, '[,"\r\n]')).as_py() for column in ids)
    options = pyarrow.csv.WriteOptions(
        include_header=False, quoting_style="needed" if needs_quotes else "none"
    )
    with replacing(path) as partial, partial.open("wb") as stream:
        stream.write((",".join(table.column_names) + "\n").encode())
        pyarrow.csv.write_csv(table, stream, options)


def _write_jsonl(tables: Iterator[pa.Table], path: Path) -> None:
    with replacing(path) as partial, partial.open("w", encoding="ascii", newline="\n") as stream:
        for table in tables:
            for batch in table.to_batches(max_chunksize=_ROWS_AT_ONCE):
                stream.writelines(_json_line(row) for row in batch.to_pylist())


def _json_line(row: dict[str, Any]) -> str:
    plain = {name: value for name, value in row.items() if name not in TEXTS}
    # The texts are JSON already: spliced in as they stand, nothing can be lost on the way.
    spliced = "".join(f', "{name}": {row[name]}' for name in TEXTS)
    return json.dumps(plain)[:-1] + spliced + "}\n"


def _write_dataset(tables: Iterator[pa.Table], path: Path, *, key: str) -> None:
    from datasets import Dataset, disable_progress_bars, enable_progress_bars, is_progress_bar_enabled

    had_bars = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory(prefix=".partial-data-", dir=path.parent) as scratch:
            file = Path(scratch) / "selected.arrow"
            _write_stream(tables, file)
            with publish_folder(path, kind="dataset", key=key) as partial:
                Dataset.from_file(str(file)).save_to_disk(partial)
    finally:
        if had_bars:
            enable_progress_bars()


def _write_stream(tables: Iterator[pa.Table], path: Path) -> None:
    """The texts as the strings or messages that they are, in a file that `datasets` maps into memory."""
    first = next(tables)
    kind = pa.string() if _all_start_with(first["prompt"], '"') else _MESSAGES
    schema = first.schema
    for name in TEXTS:
        schema = schema.set(schema.get_field_index(name), pa.field(name, kind))
    with pa.ipc.new_stream(str(path), schema) as writer:
        for table in itertools.chain([first], tables):
            for batch in table.to_batches(max_chunksize=_ROWS_AT_ONCE):
                writer.write_batch(_decoded(batch, schema))


def _decoded(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    kind = schema.field("prompt").type
    sign = '"' if kind == pa.string() else "["
    if not all(_all_start_with(batch[name], sign) for name in TEXTS):
        raise DataError("some pairs are text and some are messages, which no data set holds: export jsonl")
    columns = [
        pa.array([json.loads(text) for text in batch[name].to_pylist()], type=kind)
        if name in TEXTS
        else batch[name]
        for name in schema.names
    ]
    return pa.record_batch(columns, schema=schema)


def _all_start_with(column: pa.Array | pa.ChunkedArray, sign: str) -> bool:
    return bool(pc.all(pc.starts_with(column, sign), min_count=0).as_py())


# ----------------------------------------------------------------------------------------------------
# The texts of the selected pairs in training order, however many: put in order on disk, not in memory.


TEXTS = ("prompt", "chosen", "rejected")

KEPT = "kept"

_FEWEST_IN_PART = 20_000

_MOST_PARTS = 200

_TEXTS_AT_ONCE = 10_000

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
        yield from pairs.select(columns).to_batches(max_chunksize=_TEXTS_AT_ONCE)
        return
    with pq.ParquetFile(pairs) as file:
        yield from file.iter_batches(batch_size=_TEXTS_AT_ONCE, columns=list(columns))
