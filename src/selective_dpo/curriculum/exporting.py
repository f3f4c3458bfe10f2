"""A curriculum in other programs' formats."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from selective_dpo.artifacts import publish_folder, replacing
from selective_dpo.curriculum.table import Curriculum, loss_column
from selective_dpo.curriculum.texts import TEXTS, Pairs, selected_texts
from selective_dpo.errors import ConfigError, DataError

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
      `loss_step00_seed41` ..., `learning_order` (the mean loss); then `difficulty`, where another
      criterion makes it, and `pair_id`, where it differs;
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
    total_P = np.zeros(len(table))
    held_P = np.zeros(len(table), dtype=np.int64)
    for column in losses.values():
        total_P += pc.fill_null(column, 0.0).to_numpy()
        held_P += np.asarray(column.is_valid())
    columns: dict[str, Any] = {
        "prompt_id": table["prompt_id"],
        **losses,
        "learning_order": _means(total_P, held_P),
    }
    if (facts.get("select") or {}).get("aggregate", "mean") != "mean":
        columns["difficulty"] = table["difficulty"]
    if table["pair_id"] != table["prompt_id"]:
        columns["pair_id"] = table["pair_id"]
    return pa.table(columns)


def _means(total_P: NDArray[np.float64], held_P: NDArray[np.int64]) -> pa.Array:
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
