"""How likely a pair's label is wrong, from held-out margins."""

from __future__ import annotations

import numpy as np
from numpy.polynomial.legendre import legvander
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

_DEGREE, _PRIOR = 3, 1.0
_MAX_ITERATIONS, _TOLERANCE = 100, 1e-10


def probability_wrong(margin_P: ArrayLike) -> NDArray[np.float64]:
    """How likely a fresh label of the same annotators contradicts the pair's. [P]

    A margin of sign and size says which answer the scorers prefer, and how much. How often labels contradict
    such a verdict is counted in the data themselves, by the margin's size: a logistic regression of "the
    label contradicts the scorers" on the rank of |margin|, a cubic in Legendre's polynomials, whose
    coefficients have a standard normal prior. So much is the scorers' error e(|margin|), at most one half.
    Then e is how likely a label is wrong that they agree with, and 1 - e one that they contradict. Larger
    margins need not be surer ones: those of odd answers can be huge and say little.

    It assumes that pairs with margins of one size are alike, and that no scorer has seen a pair that it
    measured. What it estimates is disagreement with the label as it would be given again: an annotator who
    errs makes it nearer to 0.5 than the probability that the label contradicts a truth behind it, and a taste
    that scorers and annotators share, such as for length, is not seen (docs/issues.md).

    Args:
        margin_P: held-out margins [P], finite: positive where the scorers agree with the label.
    """
    margin = np.asarray(margin_P, dtype=np.float64)
    if not len(margin):
        return np.empty(0)
    contradicts_P = np.where(margin == 0.0, 0.5, margin < 0.0)
    place_P = (2.0 * rankdata(np.abs(margin)) - 1.0) / len(margin) - 1.0  # -1 to 1
    error_P = np.minimum(0.5, _share_along(place_P, contradicts_P))
    return np.asarray(np.where(margin == 0.0, 0.5, np.where(margin < 0.0, 1.0 - error_P, error_P)))


def _share_along(place_P: NDArray[np.float64], outcome_P: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share of an outcome (0 to 1) as a smooth function of a place from -1 to 1. [P]

    Newton's method on the log posterior, which is concave (Bishop 2006, section 4.3.3).
    """
    basis_PD = legvander(place_P, _DEGREE)
    prior_DD = _PRIOR * np.eye(_DEGREE + 1)
    weights_D = np.zeros(_DEGREE + 1)
    for _ in range(_MAX_ITERATIONS):
        share_P = _sigmoid(basis_PD @ weights_D)
        gradient_D = basis_PD.T @ (outcome_P - share_P) - prior_DD @ weights_D
        curvature_DD = basis_PD.T @ (basis_PD * (share_P * (1.0 - share_P))[:, None]) + prior_DD
        step_D = np.linalg.solve(curvature_DD, gradient_D)
        # A full step can overshoot where shares are near 0 or 1.
        weights_D += step_D / max(1.0, float(np.abs(step_D).max()))
        if np.abs(step_D).max() < _TOLERANCE:
            break
    return _sigmoid(basis_PD @ weights_D)


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.exp(-np.logaddexp(0.0, -x)))
