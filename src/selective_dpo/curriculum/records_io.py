"""records.parquet: the columns of `Records`, by their names."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from selective_dpo.core.records import Records
from selective_dpo.curriculum.arrow_columns import codes, text_array
from selective_dpo.errors import ArtifactError

_TEXT = ("pair_id", "prompt_id")
_WHOLE = ("seed", "fold", "evaluation", "step")


def _kind(name: str) -> pa.DataType:
    if name in _TEXT:
        return pa.string()
    return pa.int64() if name in _WHOLE else pa.float64()


SCHEMA = pa.schema(
    [pa.field(field.name, _kind(field.name), nullable=False) for field in dataclasses.fields(Records)]
)


def write_records(records: Records, path: Path) -> None:
    """Write records to `path`, as a file of a folder that is still being filled (see `publish_folder`).

    Raises:
        ValueError: the columns differ in length.
    """
    columns = [pa.array(getattr(records, field.name), type=field.type) for field in SCHEMA]
    pq.write_table(pa.Table.from_arrays(columns, schema=SCHEMA), path)


def read_records(path: Path) -> Records:
    """Read a records file.

    Raises:
        ArtifactError: it is missing or not Parquet, its columns are not those of `Records` in name and
            type, or a value is null.
    """
    table = read_columns(path, SCHEMA.names)
    columns: dict[str, Any] = {name: _to_numpy(table[name]) for name in SCHEMA.names}
    return Records(**columns)


def concat_records(parts: Sequence[Records]) -> Records:
    """The records of several scorers, one after the other.

    Raises:
        ValueError: there are none to put together.
    """
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in SCHEMA.names
    }
    return Records(**columns)


def read_columns(path: Path, names: Sequence[str]) -> pa.Table:
    """Some columns of a records file, as Arrow; all of it is checked as `read_records` does."""
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist: run the scoring that makes it")
    try:
        schema = pq.read_schema(path)
        _require_record_columns(path, schema)
        # A column that cannot hold nulls need not be read to know that there are none.
        nullable = [name for name in SCHEMA.names if schema.field(name).nullable]
        table = pq.read_table(path, columns=[*dict.fromkeys([*names, *nullable])])
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:  # also names that are no text
        raise ArtifactError(
            f"{path} is not a Parquet file ({error}); delete its folder and score again"
        ) from error
    empty = [name for name in table.column_names if table[name].null_count]
    if empty:
        raise ArtifactError(f"{path} has nulls in column(s) {', '.join(empty)}")
    return table.select(names).cast(pa.schema([SCHEMA.field(name) for name in names]))


def _require_record_columns(path: Path, schema: pa.Schema) -> None:
    found = {field.name: field.type for field in schema}
    wanted = {field.name: field.type for field in SCHEMA}
    if found != wanted or len(schema) != len(SCHEMA):
        wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        wrong += sorted({name for name in schema.names if schema.names.count(name) > 1})
        raise ArtifactError(
            f"{path} does not hold records: column(s) {', '.join(wrong)} missing, extra, repeated or mistyped"
        )


def _to_numpy(column: pa.ChunkedArray) -> NDArray[Any]:
    if column.type != pa.string():
        return np.asarray(column.to_numpy())
    # Ids repeat in every evaluation: only the distinct ones are converted.
    code_N, distinct = codes(column)
    return np.asarray(text_array(distinct)[code_N])
