"""From records files straight to the table of losses: 30 million records are no problem as columns.

A file's ids stay in Arrow and are read as codes; the losses go from the file into their places. The
result equals `loss_table(concat_records([read_records(path) ...]))`, which needs ten times the memory.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from selective_dpo.core.records import Axes, CodedRecords, LossTable, arrange
from selective_dpo.curriculum.arrow_columns import codes, first_rows, text_array
from selective_dpo.curriculum.records_io import read_columns

_COLUMNS = ("pair_id", "prompt_id", "seed", "fold", "evaluation", "loss")


def read_loss_table(
    paths: Sequence[Path], *, allow_partial: bool = False, without: Collection[str] = ()
) -> LossTable:
    """The losses in records files, by pair, seed and evaluation, each exactly once.

    Pairs of the ids `without` are left out, whatever was measured of them.

    Raises:
        ArtifactError: a file is missing, or does not hold records (see `read_records`).
        RecordsError: what `loss_table` refuses.
    """
    files = [_read(path, pa.array(list(without), type=pa.string())) for path in paths]
    ids = pa.chunked_array([file.pairs.values for file in files], type=pa.string())
    id_N, distinct = codes(ids)
    by_id_P = pc.sort_indices(distinct).to_numpy()
    prompts = pa.chunked_array([file.prompts for file in files], type=pa.string())
    place_P = np.empty(len(by_id_P), dtype=np.int32)
    place_P[by_id_P] = np.arange(len(by_id_P))
    first_P = first_rows(id_N, len(distinct))
    axes = Axes(
        text_array(distinct.take(pa.array(by_id_P))),
        text_array(prompts.take(pa.array(first_P[by_id_P]))),
        _axis([file.seeds for file in files]),
        _axis([file.evaluations for file in files]),
    )
    starts = np.cumsum([0, *(len(file.pairs.values) for file in files)])
    parts = [
        _placed(file, place_P[id_N[start:stop]], axes)
        for file, start, stop in zip(files, starts[:-1], starts[1:], strict=True)
    ]
    return arrange(axes, parts, allow_partial=allow_partial)


class _Coded(NamedTuple):
    """A column as its distinct values and the place of each row's among them."""

    code_R: NDArray[np.int32]
    values: pa.Array


class _File(NamedTuple):
    pairs: _Coded
    prompts: pa.Array
    """Of each distinct pair."""
    seeds: _Coded
    evaluations: _Coded
    fold_R: NDArray[np.int64]
    loss_R: NDArray[np.float64]


def _read(path: Path, without: pa.Array) -> _File:
    table = read_columns(path, _COLUMNS)
    if len(without):
        table = table.filter(pc.invert(pc.is_in(table["pair_id"], value_set=without)))
    pairs = _Coded(*codes(table["pair_id"]))
    first = first_rows(pairs.code_R, len(pairs.values))
    return _File(
        pairs,
        _one_chunk(table["prompt_id"].take(pa.array(first))),
        _Coded(*codes(table["seed"])),
        _Coded(*codes(table["evaluation"])),
        table["fold"].to_numpy(),
        table["loss"].to_numpy(),
    )


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return combined if isinstance(combined, pa.Array) else pa.array([], type=column.type)


def _axis(columns: Sequence[_Coded]) -> tuple[int, ...]:
    return tuple(sorted({value for column in columns for value in column.values.to_pylist()}))


def _placed(file: _File, place_D: NDArray[np.int32], axes: Axes) -> CodedRecords:
    return CodedRecords(
        place_D[file.pairs.code_R],
        _along(file.seeds, axes.seeds_S),
        _along(file.evaluations, axes.evaluations_E),
        file.fold_R,
        file.loss_R,
    )


def _along(column: _Coded, axis: tuple[int, ...]) -> NDArray[np.int32]:
    places = [axis.index(value) for value in column.values.to_pylist()]
    return np.array(places, dtype=np.int32)[column.code_R]
