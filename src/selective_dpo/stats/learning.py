"""When pairs are learned and forgotten, from held-out margins; and what two selections share by chance.

Shapes: P pairs, S seeds, E evaluations in their order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def margins_from_losses(losses: Floats) -> Floats:
    """The margin, beta times the difference of log-ratios, of DPO's own loss: -ln(e^loss - 1).

    It solves loss = ln(1 + e^-margin) (Rafailov et al. 2023, arXiv 2305.18290, eq. 7). Any shape.

    Raises:
        ValueError: a loss is not above 0, so it is not DPO's own.
    """
    if not (losses > 0.0).all():
        raise ValueError("DPO's own loss is above 0")
    # ln(e^x - 1) = x + ln(1 - e^-x), which does not overflow.
    return np.asarray(-(losses + np.log(-np.expm1(-losses))))


def learned_steps(margins_PSE: Floats, delta: float) -> NDArray[np.int64]:
    """The first evaluation, from 1, from which on the margin stays above `delta`; [P, S].

    E + 1 where it is not above `delta` at the last one: not learned (Gao et al. 2025, arXiv 2502.09650).
    """
    above_PSE = margins_PSE > delta
    # Evaluations at the end that are above without a gap.
    held_PS = np.logical_and.accumulate(above_PSE[:, :, ::-1], axis=2).sum(axis=2)
    return np.asarray(margins_PSE.shape[2] + 1 - held_PS, dtype=np.int64)


def forgetting_events(margins_PSE: Floats, delta: float = 0.0) -> NDArray[np.int64]:
    """How often the margin was above `delta` at one evaluation and is not at the next; [P, S].

    The forgetting events of Toneva et al. 2019 (arXiv 1812.05159), counted on held-out pairs.
    """
    above_PSE = margins_PSE > delta
    return np.asarray((above_PSE[:, :, :-1] & ~above_PSE[:, :, 1:]).sum(axis=2), dtype=np.int64)


def chance_jaccard(fraction: float) -> float:
    """Jaccard of two unrelated selections of this share of the pairs: f / (2 - f).

    They share f of each on average: |A and B| = f |A|, |A or B| = (2 - f) |A|.
    """
    return fraction / (2.0 - fraction)
