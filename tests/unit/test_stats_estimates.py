"""Means with clustered standard errors, against arithmetic on paper."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selective_dpo.stats.estimates import NORMAL_95, clustered_mean, clustered_share


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


def test_a_share_of_independent_observations_has_wilsons_interval() -> None:
    # 3 of 10, one a prompt. The clustered variance is .21 / 9 against .21 / 10 at most: r is held at 1.
    # With t = 2.2622 of 9 degrees of freedom, w = t^2 / 10 = .51174: centre (.3 + w / 2) / (1 + w) = .36770,
    # reach sqrt(.21 w + w^2 / 4) / (1 + w) = sqrt(.10747 + .06547) / 1.51174 = .27509.
    estimate = clustered_share([1.0] * 3 + [0.0] * 7, range(10))
    assert estimate.value == pytest.approx(0.3)
    assert estimate.standard_error == pytest.approx(math.sqrt(0.21 / 9))
    assert estimate.low == pytest.approx(0.36770 - 0.27509, abs=2e-5)
    assert estimate.high == pytest.approx(0.36770 + 0.27509, abs=2e-5)


def test_samples_that_agree_add_nothing_and_samples_that_differ_do() -> None:
    once = clustered_share([1.0, 1.0, 0.0, 0.0], range(4))
    four_times = clustered_share(np.repeat([1.0, 1.0, 0.0, 0.0], 4), np.repeat(range(4), 4))
    assert four_times == pytest.approx(once)
    # All prompts at exactly 1/2: r = (0 + .1) / (4 / 4 + .1), so w = t^2 r / 4 with t = 3.1824.
    halves = clustered_share([1.0, 0.0] * 4, np.repeat(range(4), 2))
    weight = 3.1824463**2 / 4 / 11
    assert halves.standard_error == 0.0
    assert halves.high - halves.low == pytest.approx(
        2 * math.sqrt(weight / 4 + weight**2 / 4) / (1 + weight), rel=1e-6
    )


def test_at_the_ends_the_interval_has_width_and_stays_inside() -> None:
    every = clustered_share([1.0] * 60, np.repeat(range(20), 3))
    # As 20 of 20: t = 2.0930 of 19 degrees of freedom; 20 / (20 + t^2).
    assert (every.value, every.high) == (1.0, 1.0)
    assert every.low == pytest.approx(20 / (20 + 2.0930**2), abs=1e-5)
    none = clustered_share([0.0] * 60, np.repeat(range(20), 3))
    assert (none.low, none.high) == (0.0, pytest.approx(1.0 - every.low))
    alike = clustered_share([0.0] * 20, range(20), least=-1.0)
    assert -0.2 < alike.low < 0.0 < alike.high < 0.2
    assert alike.low == pytest.approx(-alike.high)


def test_a_share_of_one_cluster_has_no_interval_and_other_values_are_no_shares() -> None:
    estimate = clustered_share([1.0, 0.0], ["a", "a"])
    assert estimate.value == 0.5
    assert all(math.isnan(number) for number in estimate[1:])
    with pytest.raises(ValueError, match="between 0 and 1"):
        clustered_share([1.5, 0.0], ["a", "b"])


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 5)), min_size=1, max_size=30))
def test_a_shares_interval_holds_it_and_is_within_bounds(rows: list[tuple[float, int]]) -> None:
    estimate = clustered_share([row[0] for row in rows], [row[1] for row in rows])
    if not math.isnan(estimate.low):
        assert 0.0 <= estimate.low <= estimate.value <= estimate.high <= 1.0
        assert estimate.low < estimate.high


@pytest.mark.parametrize("alike", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prompts", [20, 200])
@pytest.mark.parametrize("truth", [0.5, 0.9, 0.958])
def test_a_shares_interval_covers_the_truth(truth: float, prompts: int, alike: float) -> None:
    # Four verdicts a prompt, whose correlation is `alike`. The share covered of 1,600 repetitions has a
    # standard error of .5%; that of the normal interval is between .53 and .94 near the end.
    generator = np.random.default_rng([prompts, int(1000 * truth)])
    shape = (1600, prompts)
    if alike in (0.0, 1.0):
        chance = np.full(shape, truth) if alike == 0.0 else generator.random(shape) < truth
    else:
        concentration = 1 / alike - 1
        chance = generator.beta(truth * concentration, (1 - truth) * concentration, size=shape)
    share = generator.binomial(4, chance) / 4
    found = [clustered_share(row, range(prompts)) for row in share]
    covered = np.mean([each.low <= truth <= each.high for each in found])
    assert covered >= 0.93, covered
    assert all(0.0 <= each.low < each.high <= 1.0 for each in found)
