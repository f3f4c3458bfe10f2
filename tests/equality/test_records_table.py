"""The columns' way from records files to the table of losses equals the plain one, refusals included."""

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
    concat_records,
    loss_table,
    read_loss_table,
    read_records,
    write_records,
)
from selective_dpo.errors import ArtifactError, RecordsError

WHAT = ("pair_ids_P", "prompt_ids_P", "seeds_S", "evaluations_E", "losses_PSE")


def records_of(rows: list[tuple[str, int, int, int, float]]) -> Records:
    """Rows of (pair, seed, fold, evaluation, loss); a pair's prompt is its id without the last letter."""
    pairs, seeds, folds, evaluations, losses = zip(*rows, strict=True) if rows else ((), (), (), (), ())
    numbers = np.array(losses, dtype=np.float64)
    return Records(
        pair_id=np.array(pairs, dtype=np.str_),
        prompt_id=np.array([f"of {pair[:-1]}" for pair in pairs], dtype=np.str_),
        seed=np.array(seeds, dtype=np.int64),
        fold=np.array(folds, dtype=np.int64),
        evaluation=np.array(evaluations, dtype=np.int64),
        step=np.array(evaluations, dtype=np.int64),
        **dict.fromkeys(SCHEMA.names[6:], numbers),
    )


def random_rows(pair_ids: list[str], seeds: list[int], evaluations: int, seed: int = 0) -> list[tuple]:
    """All records of a protocol, in random order, with folds that change from seed to seed."""
    generator = np.random.default_rng(seed)
    folds = generator.integers(0, 2, size=(len(pair_ids), len(seeds)))
    rows = [
        (pair_ids[p], seeds[s], int(folds[p, s]), e + 1, float(generator.normal()))
        for p, s, e in itertools.product(range(len(pair_ids)), range(len(seeds)), range(evaluations))
    ]
    return [rows[place] for place in generator.permutation(len(rows))]


def write_files(folder: Path, rows: list[tuple], files: int) -> list[Path]:
    paths = [folder / f"{number}.parquet" for number in range(files)]
    for number, path in enumerate(paths):
        write_records(records_of(rows[number::files]), path)
    return paths


def assert_equal(found: LossTable, expected: LossTable) -> None:
    for name in WHAT:
        left, right = getattr(found, name), getattr(expected, name)
        assert type(left) is type(right)
        np.testing.assert_array_equal(left, right)
        assert getattr(left, "dtype", None) == getattr(right, "dtype", None)


def both(paths: list[Path], *, allow_partial: bool = False) -> tuple[LossTable, LossTable]:
    plain = concat_records([read_records(path) for path in paths])
    return read_loss_table(paths, allow_partial=allow_partial), loss_table(plain, allow_partial=allow_partial)


def refusals(paths: list[Path], *, allow_partial: bool = False) -> list[str]:
    plain = concat_records([read_records(path) for path in paths])
    messages = []
    for make in (
        lambda: read_loss_table(paths, allow_partial=allow_partial),
        lambda: loss_table(plain, allow_partial=allow_partial),
    ):
        with pytest.raises(RecordsError) as caught:
            make()
        messages.append(str(caught.value))
    return messages


@pytest.mark.parametrize("files", [1, 6])
def test_hex_ids_in_several_files(tmp_path: Path, files: int) -> None:
    generator = np.random.default_rng(3)
    ids = [generator.bytes(16).hex() for _ in range(300)]
    found, expected = both(write_files(tmp_path, random_rows(ids, [43, 41, 42], 5), files))
    assert_equal(found, expected)
    assert found.losses_PSE.shape == (300, 3, 5)
    assert not np.isnan(found.losses_PSE).any()


# Sorted by code point, as NumPy does, whatever their lengths; the empty id is one as well.
IDS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=4),
    min_size=1,
    max_size=12,
    unique=True,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=IDS, seeds=st.lists(st.integers(0, 2**40), min_size=1, max_size=3, unique=True), drop=st.data())
def test_any_ids_seeds_and_gaps(
    tmp_path: Path, ids: list[str], seeds: list[int], drop: st.DataObject
) -> None:
    rows = random_rows([f"{each}x" for each in ids], seeds, 2)
    kept = drop.draw(st.integers(1, len(rows)))
    paths = write_files(tmp_path, rows[:kept], 2)
    found, expected = both(paths, allow_partial=True)
    assert_equal(found, expected)
    if np.isnan(expected.losses_PSE).any():
        left, right = refusals(paths)
        assert left == right


@pytest.mark.parametrize("allow_partial", [False, True])
@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("b1", 41, 0, 1, 0.5), "1 pairs have two records for one seed and evaluation: b1"),
        (("c1", 41, 0, 1, float("nan")), "1 pairs have a loss that is not finite: c1"),
        (("c1", 41, 0, 1, float("inf")), "1 pairs have a loss that is not finite: c1"),
        (("b1", 41, 1, 3, 0.5), "1 pairs have records of both folds of one seed: b1;"),
    ],
)
def test_what_is_refused_is_refused_in_the_same_words(tmp_path: Path, extra, words, allow_partial) -> None:
    rows = [(pair, 41, 0, evaluation, 0.1) for pair in ("a1", "b1") for evaluation in (1, 2)]
    for files in (1, 2):
        left, right = refusals(write_files(tmp_path, [*rows, extra], files), allow_partial=allow_partial)
        assert left == right
        assert left.startswith(words)


def test_no_records_at_all(tmp_path: Path) -> None:
    left, right = refusals(write_files(tmp_path, [], 2))
    assert left == right == "there are no records: run the scoring first"


def test_files_that_are_not_records_are_refused_alike(tmp_path: Path) -> None:
    (path,) = write_files(tmp_path, random_rows(["a1", "b1"], [41], 2), 1)
    whole = pq.read_table(path)
    nothing = whole.set_column(whole.column_names.index("margin"), "margin", pa.nulls(4, pa.float64()))
    for table, words in (
        (whole.drop_columns(["step"]), "does not hold records: .*step"),
        (nothing, "nulls in column.* margin"),  # although no table of losses reads it
    ):
        pq.write_table(table, path)
        for read in (read_records, lambda path: read_loss_table([path])):
            with pytest.raises(ArtifactError, match=words):
                read(path)
    path.unlink()
    with pytest.raises(ArtifactError, match="does not exist"):
        read_loss_table([path])
