"""A number and how sure we are of it, with observations clustered by prompt."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

NORMAL_95 = 1.959963984540054
"""97.5% quantile of the standard normal distribution."""


class Estimate(NamedTuple):
    """A mean with its clustered standard error and 95% interval."""

    value: float
    standard_error: float
    low: float
    high: float


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
    values = np.asarray(values_N, dtype=np.float64)
    labels = np.asarray(clusters_N)
    if values.ndim != 1 or values.shape != labels.shape or values.size == 0:
        raise ValueError(f"need as many values as clusters, and some: {values.shape} and {labels.shape}")
    mean = float(values.mean())
    _, cluster_of_N = np.unique(labels, return_inverse=True)
    clusters = int(cluster_of_N.max()) + 1
    residual_G = np.bincount(cluster_of_N, weights=values - mean, minlength=clusters)
    if clusters == 1:
        return Estimate(mean, float("nan"), float("nan"), float("nan"))
    variance = float((residual_G**2).sum()) / values.size**2 * clusters / (clusters - 1)
    error = float(np.sqrt(variance))
    return Estimate(mean, error, mean - NORMAL_95 * error, mean + NORMAL_95 * error)
