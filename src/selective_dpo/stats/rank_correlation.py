"""Rank correlations: of many weighted columns at once, and of two with its interval; medians by bin."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from selective_dpo.stats.estimates import NORMAL_95, Estimate


def weighted_spearman(codes_CP: NDArray[np.intp], weights_P: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman correlation [C, C] of the columns when row p stands weights_P[p] times.

    Codes are non-negative integers, in the order of the values and equal for ties. A value's mid-rank
    is the weight below it plus half of (its own weight + 1), so integer weights give exactly what
    repeating the rows would. NaN for a constant column.
    """
    deviations_CP = np.empty(codes_CP.shape)
    total = weights_P.sum()
    for codes_P, deviations_P in zip(codes_CP, deviations_CP, strict=True):
        weight_V = np.bincount(codes_P, weights_P)
        centred_V = np.cumsum(weight_V) - weight_V / 2 - total / 2
        # Codes are in range; the default mode would check them, through a buffer, a third slower.
        np.take(centred_V, codes_P, out=deviations_P, mode="clip")
    deviations_CP *= np.sqrt(weights_P)
    product_CC = deviations_CP @ deviations_CP.T
    norm_C = np.sqrt(np.diagonal(product_CC))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(product_CC / np.outer(norm_C, norm_C))


class BinnedMedians(NamedTuple):
    """Quartiles of y in bins of about equal size along x; each [bins] float."""

    centres: NDArray[np.float64]
    lower: NDArray[np.float64]
    median: NDArray[np.float64]
    upper: NDArray[np.float64]


def clustered_spearman(x_N: ArrayLike, y_N: ArrayLike, clusters_N: ArrayLike) -> Estimate:
    """Spearman's rank correlation, with a standard error that allows correlation within clusters.

    Shapes: x_N, y_N [N] float, clusters_N [N] of any hashable kind; ties get their mean rank.

    The error is the cluster sum of the empirical influence function, the ranks' own share included
    (Croux and Dehon 2010, "Influence functions of the Spearman and Kendall correlation measures"; here
    for ties also, by differentiating the variances of the ranks). The interval is symmetric on Fisher's
    z scale, so it stays within [-1, 1]. All four numbers are NaN when x or y is constant; the last
    three are NaN with one cluster.

    Raises:
        ValueError: no observations, or shapes that differ.
    """
    x, y = np.asarray(x_N, dtype=np.float64), np.asarray(y_N, dtype=np.float64)
    labels = np.asarray(clusters_N)
    if x.ndim != 1 or not x.shape == y.shape == labels.shape or x.size == 0:
        raise ValueError(f"need equally many x, y and clusters: {x.shape}, {y.shape}, {labels.shape}")
    nan = float("nan")
    code_x, code_y = (np.unique(values, return_inverse=True)[1] for values in (x, y))
    below_x, below_y = (_share_above(code_N, np.ones_like(x)) for code_N in (code_x, code_y))
    # Mean-free ranks, scaled to (-1/2, 1/2); the share of observations above is 1 - rank.
    rank_x, rank_y = 0.5 - below_x, 0.5 - below_y
    variance_x, variance_y = float((rank_x**2).mean()), float((rank_y**2).mean())
    if variance_x == 0.0 or variance_y == 0.0:
        return Estimate(nan, nan, nan, nan)
    covariance = float((rank_x * rank_y).mean())
    value = covariance / math.sqrt(variance_x * variance_y)
    influence_covariance = (
        rank_x * rank_y + _share_above(code_x, rank_y) + _share_above(code_y, rank_x) - 3 * covariance
    )
    influence_x = rank_x**2 + 2 * _share_above(code_x, rank_x) - 3 * variance_x
    influence_y = rank_y**2 + 2 * _share_above(code_y, rank_y) - 3 * variance_y
    influence_N = influence_covariance / math.sqrt(variance_x * variance_y) - value / 2 * (
        influence_x / variance_x + influence_y / variance_y
    )
    _, cluster_N = np.unique(labels, return_inverse=True)
    sums_G = np.bincount(cluster_N, weights=influence_N)
    if len(sums_G) == 1:
        return Estimate(value, nan, nan, nan)
    error = math.sqrt(float((sums_G**2).sum()) * len(sums_G) / (len(sums_G) - 1)) / x.size
    if 1 - abs(value) < 1e-12:
        return Estimate(value, error, value, value)
    reach = NORMAL_95 * error / (1 - value**2)
    return Estimate(value, error, math.tanh(math.atanh(value) - reach), math.tanh(math.atanh(value) + reach))


def _share_above(code_N: NDArray[np.intp], weights_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """(1/N) sum_j weights_j [x_j > x_i] for each i, with a tie counted one half; x by its values' order."""
    sums_V = np.bincount(code_N, weights=weights_N)
    above_V = sums_V.sum() - np.cumsum(sums_V) + sums_V / 2
    return np.asarray(above_V[code_N] / code_N.size, dtype=np.float64)


def binned_medians(x_N: ArrayLike, y_N: ArrayLike, bins: int = 10) -> BinnedMedians:
    """Quartiles of `y_N` in quantile bins of `x_N`; bins that ties make equal are merged."""
    x, y = np.asarray(x_N, dtype=np.float64), np.asarray(y_N, dtype=np.float64)
    edges = np.unique(np.quantile(x, np.linspace(0, 1, bins + 1)))
    bin_N = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, max(len(edges) - 2, 0))
    groups = [(x[bin_N == which], y[bin_N == which]) for which in np.unique(bin_N)]
    centres = np.array([np.median(inside_x) for inside_x, _ in groups])
    quartiles = np.array([np.quantile(inside_y, (0.25, 0.5, 0.75)) for _, inside_y in groups])
    return BinnedMedians(centres, *quartiles.T)
