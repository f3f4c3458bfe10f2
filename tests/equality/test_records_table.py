"""From records files to the table of losses: what a plain dictionary of the rows says, refusals included."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selective_dpo.curriculum.records import (
    SCHEMA,
    LossTable,
    Records,
    loss_table,
    read_loss_table,
    read_records,
    write_records,
)
from selective_dpo.errors import ArtifactError, RecordsError

Row = tuple[str, int, int, int, float]
"""Pair, seed, fold, evaluation, loss."""


def records_of(rows: list[Row]) -> Records:
    """A pair's prompt is its id without the last letter; its margin is minus its loss."""
    pairs, seeds, folds, evaluations, losses = zip(*rows, strict=True) if rows else ((), (), (), (), ())
    numbers = np.array(losses, dtype=np.float64)
    columns = dict.fromkeys(SCHEMA.names[6:], numbers) | {"margin": -numbers}
    return Records(
        pair_id=np.array(pairs, dtype=np.str_),
        prompt_id=np.array([f"of {pair[:-1]}" for pair in pairs], dtype=np.str_),
        seed=np.array(seeds, dtype=np.int64),
        fold=np.array(folds, dtype=np.int64),
        evaluation=np.array(evaluations, dtype=np.int64),
        step=np.array(evaluations, dtype=np.int64),
        **columns,
    )


def write_files(folder: Path, rows: list[Row], files: int) -> list[Path]:
    paths = [folder / f"{number}.parquet" for number in range(files)]
    for number, path in enumerate(paths):
        write_records(records_of(rows[number::files]), path)
    return paths


def require_as_told(table: LossTable, rows: list[Row]) -> None:
    """Every row is in its place, there is nothing else, and the axes are sorted."""
    losses = {(pair, seed, evaluation): loss for pair, seed, _, evaluation, loss in rows}
    pairs, seeds, evaluations = (sorted({key[axis] for key in losses}) for axis in range(3))
    assert table.pair_ids_P.tolist() == pairs
    assert table.prompt_ids_P.tolist() == [f"of {pair[:-1]}" for pair in pairs]
    assert (table.seeds_S, table.evaluations_E) == (tuple(seeds), tuple(evaluations))
    found = {
        (pair, seed, evaluation): float(table.losses_PSE[p, s, e])
        for (p, pair), (s, seed), (e, evaluation) in itertools.product(
            enumerate(pairs), enumerate(seeds), enumerate(evaluations)
        )
        if not np.isnan(table.losses_PSE[p, s, e])
    }
    assert found == losses
    np.testing.assert_array_equal(table.others["margin"], -table.losses_PSE)


# Sorted by code point, as NumPy does, whatever their lengths; the empty id is one as well.
IDS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=4),
    min_size=1,
    max_size=8,
    unique=True,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ids=IDS,
    seeds=st.lists(st.integers(0, 2**40), min_size=1, max_size=3, unique=True),
    files=st.integers(1, 3),
    drawn=st.data(),
)
def test_any_ids_seeds_files_and_gaps(
    tmp_path: Path, ids: list[str], seeds: list[int], files: int, drawn: st.DataObject
) -> None:
    generator = np.random.default_rng(0)
    cells = itertools.product([f"{each}x" for each in ids], enumerate(seeds), (1, 2))
    rows = [(pair, seed, s % 2, number, float(generator.normal())) for pair, (s, seed), number in cells]
    rows = [rows[place] for place in generator.permutation(len(rows))]
    kept = rows[: drawn.draw(st.integers(1, len(rows)))]
    paths = write_files(tmp_path, kept, files)
    require_as_told(read_loss_table(paths, allow_partial=True, columns=["margin"]), kept)
    require_as_told(loss_table(records_of(kept), allow_partial=True, columns=["margin"]), kept)
    left_out = kept[0][0]
    others = [row for row in kept if row[0] != left_out]
    if others:
        table = read_loss_table(paths, allow_partial=True, without=[left_out], columns=["margin"])
        require_as_told(table, others)


@pytest.mark.parametrize("allow_partial", [False, True])
@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("b1", 41, 0, 1, 0.5), "1 pairs have two records for one seed and evaluation: b1"),
        (("c1", 41, 0, 1, float("nan")), "1 pairs have a loss that is not finite: c1"),
        (("b1", 41, 1, 3, 0.5), "1 pairs have records of both folds of one seed: b1;"),
    ],
)
def test_a_fault_is_found_across_files(tmp_path: Path, extra: Row, words: str, allow_partial: bool) -> None:
    rows = [(pair, 41, 0, evaluation, 0.1) for pair in ("a1", "b1") for evaluation in (1, 2)]
    for files in (1, 2):
        with pytest.raises(RecordsError, match=words):
            read_loss_table(write_files(tmp_path, [*rows, extra], files), allow_partial=allow_partial)


def test_no_records_at_all(tmp_path: Path) -> None:
    for paths in ([], write_files(tmp_path, [], 2)):
        with pytest.raises(RecordsError, match="there are no records: run the scoring first"):
            read_loss_table(paths)


def test_files_that_are_not_records_are_refused_alike(tmp_path: Path) -> None:
    (path,) = write_files(tmp_path, [("a1", 41, 0, 1, 0.1), ("b1", 41, 0, 1, 0.2)], 1)
    whole = pq.read_table(path)
    nothing = whole.set_column(whole.column_names.index("margin"), "margin", pa.nulls(2, pa.float64()))
    for table, words in (
        (whole.drop_columns(["step"]), "does not hold records: .*step"),
        (nothing, "nulls in column.* margin"),  # although this table of losses does not read it
    ):
        pq.write_table(table, path)
        for read in (read_records, lambda path: read_loss_table([path])):
            with pytest.raises(ArtifactError, match=words):
                read(path)
    path.unlink()
    with pytest.raises(ArtifactError, match="does not exist"):
        read_loss_table([path])
