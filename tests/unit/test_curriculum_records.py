"""Records by pair, seed and evaluation, each exactly once."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from selective_dpo.curriculum.records import LossTable, Records, codes, id_positions, loss_table, text_array
from selective_dpo.errors import IdentityError, RecordsError

Cell = tuple[str, int, int, float]


def records(cells: list[Cell]) -> Records:
    """Rows of (pair, seed, evaluation, loss); the pair's prompt is its name's first letter."""
    count = len(cells)
    pairs, seeds, evaluations, losses = zip(*cells, strict=True) if cells else ((), (), (), ())
    nothing = np.zeros(count)
    return Records(
        pair_id=np.array(pairs, dtype=np.str_),
        prompt_id=np.array([pair[0] for pair in pairs], dtype=np.str_),
        seed=np.array(seeds, dtype=np.int64),
        fold=np.zeros(count, dtype=np.int64),
        evaluation=np.array(evaluations, dtype=np.int64),
        step=np.array(evaluations, dtype=np.int64) * 10,
        policy_chosen_logp=nothing,
        policy_rejected_logp=nothing,
        reference_chosen_logp=nothing,
        reference_rejected_logp=nothing,
        margin=nothing,
        loss=np.array(losses, dtype=np.float64),
    )


def complete(pairs: list[str], seeds: list[int], evaluations: list[int]) -> list[Cell]:
    """Loss 100 pair + 10 seed + evaluation, all by place: a cell's loss says where it belongs."""
    return [
        (pairs[p], seeds[s], evaluations[e], 100.0 * p + 10.0 * s + e)
        for p, s, e in itertools.product(range(len(pairs)), range(len(seeds)), range(len(evaluations)))
    ]


def test_every_loss_stands_in_its_place_whatever_the_order_of_the_rows() -> None:
    cells = complete(["a1", "a2", "b1"], [7, 41], [1, 2, 5])
    shuffled = [cells[place] for place in np.random.default_rng(0).permutation(len(cells))]
    table = loss_table(records(shuffled))
    assert table.pair_ids_P.tolist() == ["a1", "a2", "b1"]
    assert table.prompt_ids_P.tolist() == ["a", "a", "b"]
    assert (table.seeds_S, table.evaluations_E) == ((7, 41), (1, 2, 5))
    expected = np.array([[[100 * p + 10 * s + e for e in range(3)] for s in range(2)] for p in range(3)])
    np.testing.assert_array_equal(table.losses_PSE, expected)
    assert table.counts_P.tolist() == [6, 6, 6]


def test_no_records_say_what_to_do() -> None:
    with pytest.raises(RecordsError, match="run the scoring first"):
        loss_table(records([]))


def test_a_missing_record_is_an_error_that_names_the_pair() -> None:
    cells = complete(["a1", "a2", "b1"], [41, 42], [1, 2])
    cells = [cell for cell in cells if cell[:3] not in {("a2", 42, 2), ("b1", 41, 1), ("b1", 41, 2)}]
    with pytest.raises(RecordsError, match=r"^2 of 3 pairs lack some of their 4 records: a2, b1; .*partial$"):
        loss_table(records(cells))
    table = loss_table(records(cells), allow_partial=True)
    assert table.counts_P.tolist() == [4, 3, 2]
    assert np.isnan(table.losses_PSE[1, 1, 1])
    assert np.isnan(table.losses_PSE[2, 0]).all()


@pytest.mark.parametrize("allow_partial", [False, True])
def test_a_record_that_stands_twice_is_never_averaged(allow_partial: bool) -> None:
    cells = complete(["a1", "b1"], [41], [1, 2])
    with pytest.raises(RecordsError, match=r"^1 pairs have two records for one seed and evaluation: b1$"):
        loss_table(records([*cells, cells[-1]]), allow_partial=allow_partial)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("allow_partial", [False, True])
def test_a_loss_that_is_not_finite_is_never_skipped(bad: float, allow_partial: bool) -> None:
    cells = [*complete(["a1", "b1"], [41], [1]), ("c1", 41, 1, bad)]
    with pytest.raises(RecordsError, match=r"^1 pairs have a loss that is not finite: c1$"):
        loss_table(records(cells), allow_partial=allow_partial)


@pytest.mark.parametrize("allow_partial", [False, True])
def test_records_of_both_folds_of_a_seed_are_refused(allow_partial: bool) -> None:
    # The half that a1 is in for seed 42 is another one than for seed 41, which is as it should be.
    cells = complete(["a1", "b1"], [41, 42], [1, 2])
    found = records(cells)
    fold = np.where((found.pair_id == "a1") & (found.seed == 42), 1, found.fold)
    assert loss_table(replace(found, fold=fold)).counts_P.tolist() == [4, 4]
    # b1's second evaluation under seed 41 comes from a scorer that was trained on b1.
    fold[(found.pair_id == "b1") & (found.seed == 41) & (found.evaluation == 2)] = 1
    with pytest.raises(RecordsError, match=r"^1 pairs have records of both folds of one seed: b1; .*again$"):
        loss_table(replace(found, fold=fold), allow_partial=allow_partial)


def test_many_faulty_pairs_are_counted_and_some_are_named() -> None:
    cells = [(f"p{number:04d}", 41, 1, float("nan")) for number in range(1234)]
    with pytest.raises(
        RecordsError, match=r"^1,234 pairs .*: p0000, p0001, p0002, p0003, p0004 and 1,229 more$"
    ):
        loss_table(records(cells))


def test_counts_of_a_table_made_by_hand() -> None:
    losses = np.array([[[0.1, np.nan]], [[np.nan, np.nan]]])
    table = LossTable(np.array(["a", "b"]), np.array(["p", "p"]), (1,), (1, 2), losses)
    assert table.counts_P.tolist() == [1, 0]
    assert len(records([("a1", 1, 1, 0.5)])) == 1


# Columns of ids.


@pytest.mark.parametrize(
    "texts",
    [
        [],
        ["ab", "cd", "ef"],
        ["ab", "c", ""],
        ["é", "ab", "中文"],
        ["éé", "中文"],  # of one length in letters, not in bytes
        [""],
    ],
)
def test_texts_are_those_of_the_column(texts: list[str]) -> None:
    column = pa.array(texts, type=pa.string())
    expected = np.asarray(texts, dtype=np.str_)
    for given in (column, pa.chunked_array([column]), pa.chunked_array([column, column[:0]])):
        found = text_array(given)
        assert found.tolist() == texts
        assert found.dtype == expected.dtype


def test_a_slice_of_a_column_is_read_from_its_place() -> None:
    column = pa.array(["aa", "bb", "cc", "dd"])
    assert text_array(column.slice(1, 2)).tolist() == ["bb", "cc"]
    assert text_array(pa.chunked_array([column.slice(3), column.slice(0, 1)])).tolist() == ["dd", "aa"]


def test_codes_count_the_values_as_they_appear() -> None:
    column = pa.chunked_array([["b", "a", "b"], ["c", "a"]])
    code_N, distinct = codes(column)
    assert code_N.tolist() == [0, 1, 0, 2, 1]
    assert distinct.to_pylist() == ["b", "a", "c"]
    assert codes(pa.chunked_array([], type=pa.int64()))[0].tolist() == []


def test_ids_are_found_where_they_stand() -> None:
    wanted, available = pa.chunked_array([["c", "a"]]), pa.chunked_array([["a", "b"], ["c"]])
    assert id_positions(wanted, available, what="test").tolist() == [2, 0]


@pytest.mark.parametrize(
    ("wanted", "available", "words"),
    [
        (["a", "d"], ["a", "b"], "test: 1 of 2 ids are missing: d"),
        (["a", "a"], ["a", "b"], "test: wanted ids: 1 ids stand more than once: a"),
        (["a"], ["a", "b", "b"], "test: available ids: 1 ids stand more than once: b"),
    ],
)
def test_joins_that_do_not_fit_are_refused(wanted, available, words) -> None:
    with pytest.raises(IdentityError, match=words):
        id_positions(pa.chunked_array([wanted]), pa.chunked_array([available]), what="test")
