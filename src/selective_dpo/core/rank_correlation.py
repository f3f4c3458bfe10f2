"""Spearman's rank correlation between many columns at once, with weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


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
