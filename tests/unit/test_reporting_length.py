"""Rank correlation with a clustered error, and medians by bin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from selective_dpo.stats.rank_correlation import binned_medians, clustered_spearman


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(-5, 5)), min_size=3, max_size=40).filter(
        lambda pairs: len({x for x, _ in pairs}) > 1 and len({y for _, y in pairs}) > 1
    )
)
def test_the_value_is_spearmans_also_with_ties(pairs: list[tuple[int, int]]) -> None:
    x, y = np.array(pairs, dtype=float).T
    assert clustered_spearman(x, y, np.arange(len(x))).value == pytest.approx(
        stats.spearmanr(x, y).statistic, abs=1e-9
    )


@pytest.mark.parametrize("step", [0.0, 0.5], ids=["continuous", "with ties"])
def test_the_error_is_the_jackknifes_to_a_few_percent(step: float) -> None:
    # Another estimator of the same standard error: (n - 1) / n * sum (rho_without_i - mean)^2.
    generator = np.random.default_rng(3)
    x = generator.normal(size=300)
    y = 0.6 * x + generator.normal(size=300)
    if step:
        x, y = np.round(x / step) * step, np.round(y / step) * step
    without = [stats.spearmanr(np.delete(x, i), np.delete(y, i)).statistic for i in range(300)]
    jackknife = np.sqrt(299 / 300 * ((without - np.mean(without)) ** 2).sum())
    estimate = clustered_spearman(x, y, np.arange(300))
    assert estimate.standard_error == pytest.approx(jackknife, rel=0.03)
    assert estimate.low < estimate.value < estimate.high


def test_repeating_each_observation_within_its_cluster_adds_no_certainty() -> None:
    generator = np.random.default_rng(4)
    x, y, prompts = generator.normal(size=50), generator.normal(size=50), np.arange(50)
    once = clustered_spearman(x, y, prompts)
    thrice = clustered_spearman(np.repeat(x, 3), np.repeat(y, 3), np.repeat(prompts, 3))
    assert thrice == pytest.approx(once)


def test_perfect_order_and_undefined_cases() -> None:
    assert clustered_spearman([1, 2, 3], [10, 20, 30], ["a", "b", "c"]).value == pytest.approx(1.0)
    assert np.isnan(clustered_spearman([1, 1, 1], [1, 2, 3], ["a", "b", "c"])).all()
    one_cluster = clustered_spearman([1, 2, 3], [1, 3, 2], ["a", "a", "a"])
    assert one_cluster.value == pytest.approx(0.5)
    assert np.isnan(one_cluster.standard_error)
    with pytest.raises(ValueError, match="equally many"):
        clustered_spearman([1, 2], [1, 2, 3], ["a", "b"])


def test_binned_medians_by_hand() -> None:
    # Two bins at the median of x = 0..7 (3.5): y is {0, 2, 4, 6} and {8, 10, 12, 14}.
    bins = binned_medians(np.arange(8), 2 * np.arange(8), bins=2)
    np.testing.assert_allclose(bins.median, [3, 11])
    np.testing.assert_allclose(bins.centres, [1.5, 5.5])
    np.testing.assert_allclose(bins.lower, [1.5, 9.5])
    np.testing.assert_allclose(bins.upper, [4.5, 12.5])


def test_one_length_for_all_pairs_is_one_bin() -> None:
    bins = binned_medians([7, 7, 7], [1, 2, 3])
    np.testing.assert_allclose(bins.median, [2])
