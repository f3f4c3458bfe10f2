"""A number and how sure we are of it, with observations clustered by prompt."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

NORMAL_95 = 1.959963984540054
"""97.5% quantile of the standard normal distribution."""

_ONE_RARE_CLUSTER = 0.1
"""What an unseen cluster with the rare answer could add to the sum of squares (see `clustered_share`)."""


class Estimate(NamedTuple):
    """A mean with its clustered standard error and 95% interval, which need not be symmetric."""

    value: float
    standard_error: float
    low: float
    high: float

    def as_json(self) -> dict[str, float | None]:
        """JSON values, NaN as null."""
        return {name: null_if_undefined(number) for name, number in self._asdict().items()}


def null_if_undefined(number: float) -> float | None:
    """`number` for JSON, which has no NaN and no infinity."""
    return number if math.isfinite(number) else None


def clustered_mean(values_N: ArrayLike, clusters_N: ArrayLike) -> Estimate:
    """Mean of `values_N` with a standard error that allows correlation within clusters.

    Shapes: values_N [N] float, clusters_N [N] of any hashable kind; observations with equal cluster
    labels may depend on each other, others may not.

    The variance of the mean is sum_g (sum_{i in g} (x_i - mean))^2 / N^2, times G / (G - 1) for G
    clusters: the cluster-robust ("CR1") sandwich estimator for a regression on a constant (Cameron and
    Miller 2015, "A Practitioner's Guide to Cluster-Robust Inference", section II). With one cluster
    nothing can be said, and the standard error is NaN.

    Raises:
        ValueError: no observations, or shapes that differ.
    """
    mean, variance, _ = _clustered(values_N, clusters_N)
    error = math.sqrt(variance)
    return Estimate(mean, error, mean - NORMAL_95 * error, mean + NORMAL_95 * error)


def clustered_share(
    values_N: ArrayLike, clusters_N: ArrayLike, *, least: float = 0.0, most: float = 1.0
) -> Estimate:
    """`clustered_mean` of values between `least` and `most`, with an interval that stays between them.

    For shares, and for differences of shares (-1 to 1). The interval is Wilson's (1927, "Probable
    inference, the law of succession, and statistical inference", J. Am. Stat. Assoc. 22), with Student's
    t of G - 1 degrees of freedom for the normal quantile and with the effective sample size for the number
    of observations (Franco et al. 2019, "Comparative study of confidence intervals for proportions in
    complex sample surveys", J. Surv. Stat. Methodol. 7). Of G clusters of n_g observations that size is
    m = 1 / sum_g (n_g / N)^2 where all of a cluster agree, and m / r where the clustered variance is only
    r times as large as that. Near the ends a few rare answers decide r, and it may come out far too small.
    So sums of squares (of variances times m^2) have 0.1 added, in the numerator and in the denominator of
    r. With every answer the same r is then 1, and the interval that of m independent ones.

    The standard error is that of `clustered_mean`. With one cluster error and bounds are NaN.

    Raises:
        ValueError: see `clustered_mean`, or a value that is not between `least` and `most`.
    """
    shares = (np.asarray(values_N, dtype=np.float64) - least) / (most - least)
    share, variance, sizes_G = _clustered(shares, clusters_N)
    if not ((shares >= 0.0) & (shares <= 1.0)).all():
        raise ValueError(f"shares must be between {least:g} and {most:g}")
    scale, clusters = most - least, 1.0 / float(((sizes_G / sizes_G.sum()) ** 2).sum())
    added = _ONE_RARE_CLUSTER / clusters**2
    ratio = min(1.0, (variance + added) / (share * (1.0 - share) / clusters + added))
    t = float(stdtrit(max(1, len(sizes_G) - 1), 0.975))
    weight = t**2 * ratio / clusters  # t^2 over the effective sample size
    centre = (share + weight / 2.0) / (1.0 + weight)
    reach = math.sqrt(weight * share * (1.0 - share) + weight**2 / 4.0) / (1.0 + weight)
    # At 0 and at 1 the bound is the share itself but for rounding.
    low, high = min(share, max(0.0, centre - reach)), max(share, min(1.0, centre + reach))
    if math.isnan(variance):
        low = high = math.nan
    return Estimate(
        least + scale * share, scale * math.sqrt(variance), least + scale * low, least + scale * high
    )


def _clustered(values_N: ArrayLike, clusters_N: ArrayLike) -> tuple[float, float, NDArray[np.intp]]:
    """Mean, its clustered variance (NaN with one cluster), and how many observations each cluster has."""
    values = np.asarray(values_N, dtype=np.float64)
    labels = np.asarray(clusters_N)
    if values.ndim != 1 or values.shape != labels.shape or values.size == 0:
        raise ValueError(f"need as many values as clusters, and some: {values.shape} and {labels.shape}")
    mean = float(values.mean())
    _, cluster_of_N, size_G = np.unique(labels, return_inverse=True, return_counts=True)
    clusters = len(size_G)
    if clusters == 1:
        return mean, math.nan, size_G
    residual_G = np.bincount(cluster_of_N, weights=values - mean, minlength=clusters)
    return mean, float((residual_G**2).sum()) / values.size**2 * clusters / (clusters - 1), size_G
