"""Ids go between Arrow and NumPy without loss, and are joined as `positions_of` joins them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from selective_dpo.curriculum.records import codes, id_positions, text_array
from selective_dpo.errors import IdentityError


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
