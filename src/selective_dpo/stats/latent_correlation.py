"""The overlap of two selections, and the correlation of what they were selected by.

Two scores of every pair are taken to be bivariate normal with correlation rho, whatever their own
distributions (only ranks are used: a Gaussian copula). Each selects the pairs between two quantiles of
its own. Solving rho from how far the selected sets coincide is the tetrachoric correlation of Pearson
1900, "On the correlation of characters not quantitatively measurable", Phil. Trans. A 195.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

_ANGLES = 4097


@dataclass(frozen=True)
class OverlapCurve:
    """Overlap as a function of rho in [0, 1], for one pair of quantiles; made by `overlap_curve`."""

    low: float
    high: float
    angle_A: NDArray[np.float64]
    """arccos rho, rising from 0. In the angle the curve is close to a straight line where in rho it
    rises vertically: near rho = 1, which is where scorers agree well."""
    overlap_A: NDArray[np.float64]
    """Falling from 1 to the overlap by chance, `high - low`."""

    def overlap(self, rho_N: ArrayLike) -> NDArray[np.float64]:
        """Expected overlap |A and B| / |A| of the sets selected by scores of correlation rho."""
        angle_N = np.arccos(np.clip(rho_N, 0.0, 1.0))
        return np.asarray(np.interp(angle_N, self.angle_A, self.overlap_A))

    def correlation(self, overlap_N: ArrayLike) -> NDArray[np.float64]:
        """The rho of an overlap: 1 where the sets coincide, 0 at chance and below; NaN stays NaN."""
        given_N = np.asarray(overlap_N, dtype=np.float64)
        angle_N = np.interp(given_N, self.overlap_A[::-1], self.angle_A[::-1])
        # At chance exactly 0, not what is left of cos(pi / 2).
        return np.where(given_N <= self.overlap_A[-1], 0.0, np.clip(np.cos(angle_N), 0.0, 1.0))


def overlap_curve(low: float, high: float) -> OverlapCurve:
    """The curve for sets that hold the pairs from quantile `low` to quantile `high`.

    By Plackett 1954, "A reduction formula for normal multivariate integrals", Biometrika 41, the
    derivative of P(X < h, Y < k) by rho is the density at (h, k). With rho = cos(angle) that of the
    probability of the square [l, h] x [l, h] by the angle is -(e(h, h) - 2 e(l, h) + e(l, l)) / (2 pi),
    e(h, k) = exp(-(h^2 - 2 h k cos(angle) + k^2) / (2 sin(angle)^2)), which is integrated here from
    rho = 1 by the trapezoidal rule; the error is below 1e-6. For the easier half it is 1 - angle / pi.

    The curve rises with rho on [0, 1] for every set: P(X in A, Y in A) = sum_n rho^n c_n^2, with c_n
    the Hermite coefficients of A's indicator (Mehler's formula), so each overlap has one rho.

    Raises:
        ValueError: not 0 <= low < high <= 1, or everything is selected: then every rho gives overlap 1.
    """
    if not 0.0 <= low < high <= 1.0 or high - low == 1.0:
        raise ValueError(f"need two quantiles that leave some pairs out, not {low} and {high}")
    # Denser near 0, where the curve of a narrow band falls from 1 within a small angle.
    angle_A = np.linspace(0.0, np.sqrt(np.pi / 2), _ANGLES) ** 2
    h, k = float(ndtri(low)), float(ndtri(high))
    slope_A = _density(k, k, angle_A) + _density(h, h, angle_A) - 2 * _density(h, k, angle_A)
    lost_A = np.concatenate([[0.0], np.cumsum((slope_A[1:] + slope_A[:-1]) / 2 * np.diff(angle_A))])
    return OverlapCurve(low, high, angle_A, 1.0 - lost_A / (2 * np.pi * (high - low)))


def _density(h: float, k: float, angle_A: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp(-(h^2 - 2 h k cos + k^2) / (2 sin^2)); 0 where a bound is infinite, its limit at angle 0."""
    if not np.isfinite([h, k]).all():
        return np.zeros_like(angle_A)
    if h == k:
        return np.exp(-(h**2) / (1 + np.cos(angle_A)))
    density_A = np.zeros_like(angle_A)
    inner_A = angle_A[1:]
    # (h - k)^2 + 2 h k (1 - cos) is the same sum without the cancellation at small angles.
    square_A = (h - k) ** 2 + 4 * h * k * np.sin(inner_A / 2) ** 2
    density_A[1:] = np.exp(-square_A / (2 * np.sin(inner_A) ** 2))
    return density_A


def correlation_of_means(
    rho_N: ArrayLike, seeds: int, others: int, noise_ratio_N: ArrayLike = 1.0
) -> NDArray[np.float64]:
    """Correlation of the mean over `seeds` scores with the mean over `others` further ones.

    Any two of the scores correlate by rho_N: a shared part plus independent noise. For equal numbers
    this is the formula of Spearman and Brown (both 1910, Brit. J. Psychol. 3):
    k rho / (1 + (k - 1) rho); in general rho sqrt(k m) / sqrt((1 + (k - 1) rho) (1 + (m - 1) rho)).
    `noise_ratio_N` is the noise variance of the others, relative to that of the first.
    """
    rho = np.asarray(rho_N, dtype=np.float64)
    noise = 1.0 - rho
    first = seeds * rho + noise
    second = others * rho + noise * np.asarray(noise_ratio_N)
    return np.asarray(rho * np.sqrt(seeds * others) / np.sqrt(first * second))
