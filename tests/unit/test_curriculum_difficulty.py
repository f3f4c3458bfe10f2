"""Difficulty: hand-computed values, and what happens to incomplete tables."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import ArrayLike

from selective_dpo.criteria import scaled_ranks
from selective_dpo.curriculum.records import LossTable, difficulty
from selective_dpo.errors import RecordsError

NAN = float("nan")


def table_of(losses_PSE: ArrayLike) -> LossTable:
    losses = np.asarray(losses_PSE, dtype=np.float64)
    ids = np.array([f"p{index:03d}" for index in range(len(losses))])
    seeds = tuple(range(41, 41 + losses.shape[1]))
    return LossTable(ids, ids, seeds, tuple(range(1, losses.shape[2] + 1)), losses)


# Two pairs, two seeds, two evaluations.
LOSSES = [[[0.1, 0.2], [0.3, 0.8]], [[0.4, 0.6], [0.5, 0.1]]]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", [(0.1 + 0.2 + 0.3 + 0.8) / 4, (0.4 + 0.6 + 0.5 + 0.1) / 4]),
        ("final", [(0.2 + 0.8) / 2, (0.6 + 0.1) / 2]),
        ("median", [(0.2 + 0.3) / 2, (0.4 + 0.5) / 2]),
        # Pair 0 is lowest in the columns .1/.4, .2/.6, .3/.5 and highest in .8/.1: ranks 1, 1, 1, 2 of 2.
        ("rank-mean", [(0.5 + 0.5 + 0.5 + 1) / 4, (1 + 1 + 1 + 0.5) / 4]),
    ],
)
def test_aggregates_by_hand(how, expected) -> None:
    result = difficulty(table_of(LOSSES), how)
    np.testing.assert_allclose(result.difficulty_P, expected, rtol=1e-15)
    assert result.count_P.tolist() == [4, 4]


def test_spread_is_the_standard_deviation_of_the_pairs_own_losses() -> None:
    # Mean .35; deviations -.25, -.15, -.05, .45; squares .0625 + .0225 + .0025 + .2025 = .29; / 4.
    assert difficulty(table_of(LOSSES)).spread_P[0] == pytest.approx((0.29 / 4) ** 0.5)
    assert difficulty(table_of([[[0.3]], [[0.4]]])).spread_P.tolist() == [0.0, 0.0]


def test_ties_share_their_mean_rank() -> None:
    # Sorted 1, 3, 3, 7: ranks 1, 2.5, 2.5, 4 of 4.
    np.testing.assert_allclose(scaled_ranks(np.array([3.0, 1.0, 7.0, 3.0])), [2.5 / 4, 1 / 4, 1, 2.5 / 4])


@pytest.mark.parametrize("how", ["mean", "final", "median", "rank-mean"])
def test_missing_records_are_an_error_that_names_the_pair(how) -> None:
    with pytest.raises(RecordsError, match=r"1 of 2 pairs .* p001.*allow-partial"):
        difficulty(table_of([[[0.1], [0.2]], [[0.3], [NAN]]]), how)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", 0.3),
        ("final", 0.3),
        ("median", 0.3),
        # First column: .1 < .3, rank 2 of 2. The second has only the other pair.
        ("rank-mean", 1.0),
    ],
)
def test_partial_pairs_use_what_there_is_and_say_how_much(how, expected) -> None:
    result = difficulty(table_of([[[0.1], [0.2]], [[0.3], [NAN]]]), how, allow_partial=True)
    assert result.difficulty_P[1] == pytest.approx(expected)
    assert result.count_P.tolist() == [2, 1]


def test_a_pair_with_nothing_to_read_is_an_error_even_when_partial() -> None:
    with pytest.raises(RecordsError, match="no record that 'final' reads: p001"):
        difficulty(table_of([[[0.1, 0.2]], [[0.3, NAN]]]), "final", allow_partial=True)


def test_an_infinite_loss_is_an_error() -> None:
    with pytest.raises(RecordsError, match="infinite loss: p000"):
        difficulty(table_of([[[float("inf")]], [[0.3]]]), allow_partial=True)
