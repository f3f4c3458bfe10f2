"""How likely a pair's label is wrong, from held-out margins."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar

_MAX_SCALE = 1e4


def probability_wrong(margin_P: ArrayLike) -> NDArray[np.float64]:
    """sigmoid(-scale * margin): how likely a fresh label of the same annotators contradicts the pair's. [P]

    The scale is the one with the smallest mean of -log sigmoid(scale * margin) over all pairs: a logistic
    regression without intercept, in which every pair is one observation of its label (Platt 1999, with
    neither intercept nor smoothing). Where margins say nothing about labels it is 0, and all get 0.5. What it
    estimates is disagreement with the label as it would be given again: an annotator who errs makes it nearer
    to 0.5 than the probability that the label contradicts a truth behind it (docs/protocols.md).

    Args:
        margin_P: held-out margins [P], finite: positive where the scorers agree with the label.
    """
    margin = np.asarray(margin_P, dtype=np.float64)
    size = float(np.sqrt(np.mean(margin**2))) if len(margin) else 0.0
    if size == 0.0:
        return np.full(len(margin), 0.5)
    unit_P = margin / size

    def mean_loss(scale: float) -> float:
        return float(np.logaddexp(0.0, -scale * unit_P).mean())

    # The loss is convex; where it rises from 0 on, margins are no better than chance.
    if unit_P.mean() <= 0.0:
        return np.full(len(margin), 0.5)
    scale = minimize_scalar(mean_loss, bounds=(0.0, _MAX_SCALE), method="bounded").x
    return np.asarray(np.exp(-np.logaddexp(0.0, scale * unit_P)))
