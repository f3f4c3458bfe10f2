"""Fractions and max_pairs draw the stated number of rows, the same ones each time."""

from __future__ import annotations

import numpy as np

from selective_dpo.data.sources import sample_rows


def test_each_source_gives_its_share() -> None:
    masks = sample_rows([10, 7, 3, 0], [0.5, 0.5, 0.01, 0.5])
    # 10 * 0.5 = 5; 7 * 0.5 = 3.5, rounded up; at least one of a source that has rows.
    assert [int(mask.sum()) for mask in masks] == [5, 4, 1, 0]
    assert [len(mask) for mask in masks] == [10, 7, 3, 0]


def test_max_rows_is_drawn_over_all_sources() -> None:
    masks = sample_rows([600, 400], [1.0, 1.0], max_rows=100, seed=3)
    from_first = int(masks[0].sum())
    assert from_first + int(masks[1].sum()) == 100
    # Hypergeometric: mean 60, standard deviation sqrt(100 * .6 * .4 * 900 / 999) = 4.65; four of them.
    assert abs(from_first - 60) < 19


def test_max_rows_draws_only_from_what_the_fraction_left() -> None:
    half = sample_rows([100], [0.5], seed=1)[0]
    limited = sample_rows([100], [0.5], max_rows=20, seed=1)[0]
    assert limited.sum() == 20
    assert not np.any(limited & ~half)


def test_everything_is_used_without_limits() -> None:
    assert all(mask.all() for mask in sample_rows([3, 2], [1.0, 1.0], max_rows=5))
    assert sample_rows([], []) == []


def test_draws_depend_on_seed_and_source_only() -> None:
    first, second = sample_rows([100, 100], [0.5, 0.5], seed=1)
    again = sample_rows([100, 50], [0.5, 0.2], seed=1)[0]
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, sample_rows([100], [0.5], seed=2)[0])
    assert sample_rows([100], [0.5], seed=-1)[0].sum() == 50
