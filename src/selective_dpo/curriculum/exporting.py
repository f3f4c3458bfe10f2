"""A curriculum in other programs' formats."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from selective_dpo.artifacts import publish_folder
from selective_dpo.curriculum.table import Curriculum, loss_column
from selective_dpo.errors import ConfigError, DataError, IdentityError, name_some

Format = Literal["csv", "parquet", "jsonl", "datasets"]
_TEXTS = ("prompt", "chosen", "rejected")
_MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
_ROWS_AT_ONCE = 10_000


def export_curriculum(
    curriculum: Curriculum,
    path: str | Path,
    format: Format,
    *,
    pairs: pa.Table | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the curriculum to `path`, whole or not at all, and return it.

    - `csv`: every scored pair, in the columns of the original repository: `prompt_id`,
      `loss_step00_seed41` ..., `learning_order` (the mean loss); then `pair_id`, where it differs;
    - `parquet`: every scored pair, the table as it is;
    - `jsonl`: the selected pairs in training order: ids, difficulty, prompt, chosen, rejected;
    - `datasets`: the same as a folder for `datasets.load_from_disk`, in the columns TRL reads.

    `pairs` is the run's table of pairs (`data.store.load_pairs`), whose texts the last two need.

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
        with _replacing(path) as partial:
            pq.write_table(curriculum.table, partial)
    else:
        selected = _selected_texts(curriculum, pairs, format)
        if format == "jsonl":
            _write_jsonl(selected, path)
        else:
            _write_dataset(selected, path, key=curriculum.order_digest)
    return path


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


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file that becomes `path` on leaving without an error; streamed, unlike `write_atomic`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".partial-{path.name}-{uuid.uuid4().hex[:8]}"
    try:
        yield partial
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _original_columns(curriculum: Curriculum) -> pa.Table:
    table, facts = curriculum.table, curriculum.facts
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
    columns: dict[str, Any] = {"prompt_id": table["prompt_id"], **losses, "learning_order": total_P / held_P}
    if table["pair_id"] != table["prompt_id"]:
        columns["pair_id"] = table["pair_id"]
    return pa.table(columns)


def _write_csv(table: pa.Table, path: Path) -> None:
    ids = [table[name] for name in ("prompt_id", "pair_id") if name in table.column_names]
    # The original writes bare ids; quotes only where a data set's own ids need them.
    needs_quotes = any(pc.any(pc.match_substring_regex(column, '[,"\r\n]')).as_py() for column in ids)
    options = pyarrow.csv.WriteOptions(
        include_header=False, quoting_style="needed" if needs_quotes else "none"
    )
    with _replacing(path) as partial, partial.open("wb") as stream:
        stream.write((",".join(table.column_names) + "\n").encode())
        pyarrow.csv.write_csv(table, stream, options)


def _selected_texts(curriculum: Curriculum, pairs: pa.Table | None, format: str) -> pa.Table:
    """pair_id, prompt_id, difficulty and the texts (as JSON) of the selected pairs, in training order."""
    if pairs is None:
        raise ConfigError(
            f"format '{format}' needs the pairs' texts: pass --pairs with the run's pairs folder, "
            "or export csv or parquet"
        )
    kept = pairs.filter(pc.equal(pairs["status"], "kept"))
    order = pc.sort_indices(curriculum.table["position"])
    ordered = curriculum.table.take(order)
    ordered = ordered.filter(pc.greater_equal(ordered["position"], 0))
    where = pc.index_in(ordered["pair_id"], value_set=kept["pair_id"])
    if where.null_count:
        absent = ordered["pair_id"].filter(pc.is_null(where)).to_pylist()
        raise IdentityError(
            f"{len(absent):,} of {len(ordered):,} selected pairs are not among these pairs: "
            f"{name_some(absent)}; pass the pairs that the curriculum was made from"
        )
    texts = kept.select(_TEXTS).take(where)
    selected = ordered.select(["pair_id", "prompt_id", "difficulty"])
    for name in _TEXTS:
        selected = selected.append_column(name, texts[name])
    return selected


def _write_jsonl(selected: pa.Table, path: Path) -> None:
    with _replacing(path) as partial, partial.open("w", encoding="ascii", newline="\n") as stream:
        for batch in selected.to_batches(max_chunksize=_ROWS_AT_ONCE):
            stream.writelines(_json_line(row) for row in batch.to_pylist())


def _json_line(row: dict[str, Any]) -> str:
    plain = {name: value for name, value in row.items() if name not in _TEXTS}
    # The texts are JSON already: spliced in as they stand, nothing can be lost on the way.
    spliced = "".join(f', "{name}": {row[name]}' for name in _TEXTS)
    return json.dumps(plain)[:-1] + spliced + "}\n"


def _write_dataset(selected: pa.Table, path: Path, *, key: str) -> None:
    from datasets import Dataset, disable_progress_bars, enable_progress_bars, is_progress_bar_enabled

    is_text = [_all_start_with(selected[name], '"') for name in _TEXTS]
    is_messages = [_all_start_with(selected[name], "[") for name in _TEXTS]
    if not (all(is_text) or all(is_messages)):
        raise DataError("some pairs are text and some are messages, which no data set holds: export jsonl")
    kind = pa.string() if all(is_text) else _MESSAGES
    table = selected
    for name in _TEXTS:
        chunks = [
            pa.array([json.loads(text) for text in chunk.to_pylist()], type=kind)
            for chunk in selected[name].chunks
        ]
        table = table.set_column(table.column_names.index(name), name, pa.chunked_array(chunks, type=kind))
    had_bars = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        with publish_folder(path, kind="dataset", key=key) as partial:
            Dataset(table).save_to_disk(partial)
    finally:
        if had_bars:
            enable_progress_bars()


def _all_start_with(column: pa.ChunkedArray, sign: str) -> bool:
    return bool(pc.all(pc.starts_with(column, sign), min_count=0).as_py())
