"""Bootstrap over clusters: how sure we are of a statistic of pairs that share prompts.

Whole clusters (prompts) are drawn with replacement, as many as there are, and every pair counts as
often as its cluster was drawn: the cluster (or "pairs cluster", "block") bootstrap of Field and Welsh
2007, "Bootstrapping clustered data", J. R. Stat. Soc. B 69, and Cameron, Gelbach and Miller 2008,
"Bootstrap-based improvements for inference with clustered errors", Rev. Econ. Stat. 90. Intervals are
percentile intervals (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from selective_dpo.core.estimates import Estimate

LEVEL = 0.95
MOST_REPLICATES = 1000
FEWEST_REPLICATES = 100
_CELL_BUDGET = 400_000_000  # weighted values in all replicates together: 1,000 for 20,000 pairs x 20 columns

WeightedStatistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""From weights_P [P], how often each pair counts, to K statistics."""


class Draws(NamedTuple):
    """K statistics of the data, and of R resamples of it; NaN where a statistic is not defined."""

    value_K: NDArray[np.float64]
    draws_RK: NDArray[np.float64]
    clusters: int


def replicates_for(pairs: int, columns: int) -> int:
    """Number of resamples that keeps the time bounded: 1,000 for small tables, never below 100."""
    affordable = _CELL_BUDGET // max(1, pairs * columns)
    return int(np.clip(affordable, FEWEST_REPLICATES, MOST_REPLICATES))


def cluster_bootstrap(
    statistic: WeightedStatistic,
    clusters_P: ArrayLike,
    *,
    replicates: int,
    seed: int = 0,
    resampled: WeightedStatistic | None = None,
) -> Draws:
    """Evaluate `statistic` with every weight one, and under `replicates` resamples of the clusters.

    Shapes: clusters_P [P], labels of any sortable kind. `resampled` may stand in for `statistic` in the
    resamples where a cheaper form of it is good enough for an interval. Deterministic given `seed`.
    """
    labels_G, cluster_of_P = np.unique(np.asarray(clusters_P), return_inverse=True)
    clusters = len(labels_G)
    value_K = statistic(np.ones(len(cluster_of_P)))
    draws_RK = np.empty((replicates, len(value_K)))
    generator = np.random.default_rng(seed)
    for replicate in range(replicates):
        times_G = np.bincount(generator.integers(clusters, size=clusters), minlength=clusters)
        draws_RK[replicate] = (resampled or statistic)(times_G[cluster_of_P].astype(np.float64))
    return Draws(value_K, draws_RK, clusters)


def bounds(draws: Draws, level: float = LEVEL) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Percentile bounds low_K and high_K; NaN where there is one cluster, or too few defined draws."""
    usable_K = _usable(draws)
    low_K = np.full(len(draws.value_K), np.nan)
    high_K = low_K.copy()
    if usable_K.any():
        tail = (1 - level) / 2
        low_K[usable_K], high_K[usable_K] = np.nanquantile(
            draws.draws_RK[:, usable_K], [tail, 1 - tail], axis=0
        )
    return low_K, high_K


def estimates(draws: Draws, level: float = LEVEL) -> list[Estimate]:
    """Each statistic with its bootstrap standard error and percentile interval."""
    low_K, high_K = bounds(draws, level)
    usable_K = _usable(draws)
    error_K = np.full(len(draws.value_K), np.nan)
    if usable_K.any():
        error_K[usable_K] = np.nanstd(draws.draws_RK[:, usable_K], axis=0, ddof=1)
    columns = (draws.value_K, error_K, low_K, high_K)
    return [Estimate(*(float(number) for number in row)) for row in zip(*columns, strict=True)]


def _usable(draws: Draws) -> NDArray[np.bool_]:
    # One cluster says nothing about others. Of tiny tables some resamples hold one pair only, where a
    # correlation is not defined; an interval from less than half of the draws would be a made-up one.
    defined_K = np.isfinite(draws.draws_RK).mean(axis=0) >= 0.5
    return np.asarray(defined_K & np.isfinite(draws.value_K) & (draws.clusters > 1))
