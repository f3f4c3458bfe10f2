"""Means with clustered standard errors, against arithmetic on paper."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selective_dpo.core.estimates import NORMAL_95, clustered_mean


def test_two_clusters_on_paper() -> None:
    # Values 1, 2 | 6: mean 3, residuals -2, -1 | 3, sums by cluster -3 and 3.
    # Variance (9 + 9) / 3^2 * 2 / (2 - 1) = 4, standard error 2.
    estimate = clustered_mean([1.0, 2.0, 6.0], ["p", "p", "q"])
    assert estimate.value == 3.0
    assert estimate.standard_error == pytest.approx(2.0)
    assert estimate.low == pytest.approx(3.0 - 2 * NORMAL_95)
    assert estimate.high == pytest.approx(3.0 + 2 * NORMAL_95)


def test_with_one_observation_a_cluster_it_is_the_usual_standard_error() -> None:
    # Values 1, 2, 3, 6: mean 3, squares 4 + 1 + 0 + 9 = 14; sample variance 14/3, over 4 values.
    estimate = clustered_mean([1.0, 2.0, 3.0, 6.0], [0, 1, 2, 3])
    assert estimate.standard_error == pytest.approx(math.sqrt(14 / 3 / 4))


def test_copies_of_the_data_add_nothing() -> None:
    # Each observation three times in its own cluster: the same mean, the same error.
    values, clusters = np.array([0.0, 1.0, 1.0, 0.5]), np.arange(4)
    once = clustered_mean(values, clusters)
    thrice = clustered_mean(np.tile(values, 3), np.tile(clusters, 3))
    assert thrice == pytest.approx(once)


def test_opposite_values_in_one_cluster_cancel() -> None:
    # Residuals +1 and -1 sum to 0 in both clusters: nothing varies between clusters.
    assert clustered_mean([1.0, -1.0, 1.0, -1.0], list("aabb")).standard_error == 0.0


def test_one_cluster_says_nothing_about_the_error() -> None:
    estimate = clustered_mean([1.0, 2.0], ["a", "a"])
    assert estimate.value == 1.5
    assert all(math.isnan(number) for number in estimate[1:])


@pytest.mark.parametrize(("values", "clusters"), [([], []), ([1.0], ["a", "b"]), ([[1.0]], [["a"]])])
def test_shapes_that_do_not_fit_are_refused(values: list[object], clusters: list[object]) -> None:
    with pytest.raises(ValueError, match="as many values as clusters"):
        clustered_mean(values, clusters)


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 5)), min_size=2, max_size=30),
    st.floats(0.1, 10),
    st.floats(-10, 10),
)
def test_the_estimate_moves_and_stretches_with_the_data(
    rows: list[tuple[float, int]], factor: float, shift: float
) -> None:
    values, clusters = np.array([row[0] for row in rows]), [row[1] for row in rows]
    plain = clustered_mean(values, clusters)
    moved = clustered_mean(factor * values + shift, clusters)
    assert moved.value == pytest.approx(factor * plain.value + shift, abs=1e-9)
    assert moved.standard_error == pytest.approx(factor * plain.standard_error, abs=1e-9, nan_ok=True)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    # 40 clusters of 1 to 5 observations that share a random part, true mean 0; 400 repetitions.
    # The share covered has a standard error of sqrt(.95 * .05 / 400) = 1.1%; CR1 is known to cover a little
    # less with few clusters, hence 4 standard errors below.
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        clusters = np.repeat(np.arange(40), generator.integers(1, 6, size=40))
        values = generator.normal(size=40)[clusters] + generator.normal(size=len(clusters))
        estimate = clustered_mean(values, clusters)
        covered += estimate.low <= 0.0 <= estimate.high
    assert 0.95 - 4 * 0.011 < covered / 400 <= 1.0
