"""Bootstrap over clusters: how sure we are of a statistic of pairs that share prompts.

Whole clusters (prompts) are drawn with replacement, as many as there are, and every pair counts as
often as its cluster was drawn: the cluster (or "pairs cluster", "block") bootstrap of Field and Welsh
2007, "Bootstrapping clustered data", J. R. Stat. Soc. B 69, and Cameron, Gelbach and Miller 2008,
"Bootstrap-based improvements for inference with clustered errors", Rev. Econ. Stat. 90. Intervals are
percentile intervals (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13).

Of a large table only m of the n clusters are drawn in each resample, and its deviations are shrunk by
sqrt(m / n): the m out of n bootstrap of Bickel, Goetze and van Zwet 1997, "Resampling fewer than n
observations: gains, losses, and remedies for losses", Statistica Sinica 7. For statistics that are
smooth, as all here are, both are consistent. What it adds to the error of a standard error is of the order
1 / sqrt(m) of it, below 1% for the m used, where R replicates leave 1 / sqrt(2 R), 2% for 1,000. So many
small resamples tell more than a few whole ones at the same cost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from selective_dpo.stats.estimates import Estimate

LEVEL = 0.95

REPLICATES = 1000

_CELLS_A_RESAMPLE = 400_000

WeightedStatistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""From weights_P [P], how often each pair counts, to K statistics."""

RowsStatistic = Callable[[NDArray[np.intp], NDArray[np.float64]], NDArray[np.float64]]
"""The same from rows_N [N], the pairs that count at all, and weights_N [N], how often they do."""


class Draws(NamedTuple):
    """K statistics of the data, and of R resamples of it; NaN where a statistic is not defined."""

    value_K: NDArray[np.float64]
    draws_RK: NDArray[np.float64]
    clusters: int
    drawn: int | None = None
    """Clusters in each resample, where they are fewer."""


def rows_for(columns: int) -> int:
    """Most pairs of a resample, so that one over so many columns takes a few milliseconds: 22,222 for 18."""
    return _CELLS_A_RESAMPLE // max(1, columns)


def cluster_codes(labels_P: ArrayLike) -> NDArray[np.intp]:
    """Equal labels as equal numbers from 0 on, in the order of the labels."""
    labels = np.asarray(labels_P)
    if labels.dtype.kind == "U":
        # A quarter of the bytes, in the same order: ids are sorted several times faster.
        with contextlib.suppress(UnicodeEncodeError):
            labels = labels.astype(np.bytes_)
    return np.asarray(np.unique(labels, return_inverse=True)[1], dtype=np.intp)


def cluster_bootstrap(
    statistic: WeightedStatistic,
    clusters_P: ArrayLike,
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
    resampled: RowsStatistic | None = None,
    max_rows: int | None = None,
) -> Draws:
    """Evaluate `statistic` with every weight one, and under `replicates` resamples of the clusters.

    Shapes: clusters_P [P], labels of any sortable kind. `resampled` may stand in for `statistic` in the
    resamples where a cheaper form of it is good enough for an interval. Of a table of more than
    `max_rows` pairs, resamples have about so many. Deterministic given `seed`.
    """
    groups = _Groups.of(cluster_codes(clusters_P))
    drawn = groups.to_draw(max_rows)
    of_rows = resampled or _by_rows(statistic, groups.pairs)
    value_K = statistic(np.ones(groups.pairs))
    draws_RK = np.empty((replicates, len(value_K)))
    generator = np.random.default_rng(seed)
    for replicate in range(replicates):
        draws_RK[replicate] = of_rows(*groups.resample(drawn, generator))
    if drawn == groups.clusters:
        return Draws(value_K, draws_RK, drawn)
    # Around the statistic as the resamples compute it, so that what its cheaper form is off cancels.
    centre_K = of_rows(np.arange(groups.pairs), np.ones(groups.pairs))
    shrunk_RK = value_K + np.sqrt(drawn / groups.clusters) * (draws_RK - centre_K)
    return Draws(value_K, shrunk_RK, groups.clusters, drawn)


class _Groups(NamedTuple):
    """The pairs of each cluster: rows_P[start_G[g] : start_G[g] + size_G[g]]."""

    rows_P: NDArray[np.intp]
    start_G: NDArray[np.intp]
    size_G: NDArray[np.intp]

    @classmethod
    def of(cls, code_P: NDArray[np.intp]) -> _Groups:
        size_G = np.bincount(code_P)
        return cls(np.argsort(code_P, kind="stable"), np.cumsum(size_G) - size_G, size_G)

    @property
    def pairs(self) -> int:
        return len(self.rows_P)

    @property
    def clusters(self) -> int:
        return len(self.size_G)

    def to_draw(self, max_rows: int | None) -> int:
        """How many clusters make a resample of about `max_rows` pairs; all, where there are no more."""
        if max_rows is None or self.pairs <= max_rows:
            return self.clusters
        return max(2, round(self.clusters * max_rows / self.pairs))

    def resample(
        self, drawn: int, generator: np.random.Generator
    ) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """The rows of `drawn` clusters, drawn with replacement, and how often each row counts."""
        chosen_D, times_D = np.unique(generator.integers(self.clusters, size=drawn), return_counts=True)
        size_D = self.size_G[chosen_D]
        end_D = np.cumsum(size_D)
        within_N = np.arange(end_D[-1]) - np.repeat(end_D - size_D, size_D)
        rows_N = self.rows_P[np.repeat(self.start_G[chosen_D], size_D) + within_N]
        return rows_N, np.repeat(times_D, size_D).astype(np.float64)


def _by_rows(statistic: WeightedStatistic, pairs: int) -> RowsStatistic:
    def of_rows(rows_N: NDArray[np.intp], weights_N: NDArray[np.float64]) -> NDArray[np.float64]:
        weights_P = np.zeros(pairs)
        weights_P[rows_N] = weights_N
        return statistic(weights_P)

    return of_rows


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
