from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from selective_dpo.engine.batching import token_budget_batches


def test_batches_by_hand() -> None:
    # Longest first. Budget 20 holds two pairs of 5 tokens (2 * 2 * 5 = 20), or five of 2 (2 * 5 * 2 = 20).
    batches = token_budget_batches([2, 5, 1, 4, 2], 20)
    assert [batch.tolist() for batch in batches] == [[1, 3], [0, 4, 2]]


def test_a_pair_longer_than_the_budget_goes_alone() -> None:
    assert [batch.tolist() for batch in token_budget_batches([3, 30, 29], 12)] == [[1], [2], [0]]


def test_equal_lengths_keep_their_order() -> None:
    assert [batch.tolist() for batch in token_budget_batches([4] * 5, 16)] == [[0, 1], [2, 3], [4]]


def test_no_pairs_make_no_batch() -> None:
    assert token_budget_batches([], 100) == []


@given(st.lists(st.integers(0, 300), max_size=80), st.integers(1, 2000))
def test_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = token_budget_batches(lengths, budget)
    rows = np.concatenate(batches) if batches else np.array([], dtype=int)
    assert sorted(rows.tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or 2 * len(batch) * max(lengths[row] for row in batch) <= budget
    longest = [max(lengths[row] for row in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
