"""The DPO loss of a pair from its four sequence log-probabilities."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

LN_2 = float(np.log(2.0))
"""Loss of a scorer that cannot tell chosen from rejected (margin 0), in nats."""


class PairLosses(NamedTuple):
    """Margin and loss of each pair; shapes [P]."""

    margin_P: NDArray[np.float64]
    loss_P: NDArray[np.float64]


def dpo_losses(
    policy_chosen_P: ArrayLike,
    policy_rejected_P: ArrayLike,
    reference_chosen_P: ArrayLike,
    reference_rejected_P: ArrayLike,
    *,
    beta: float,
) -> PairLosses:
    """Per-pair DPO loss, -log sigmoid(margin), in nats (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    margin = beta * [(log pi(y_w|x) - log pi_ref(y_w|x)) - (log pi(y_l|x) - log pi_ref(y_l|x))]

    Shapes: each argument [P], log-probabilities summed over the completion's tokens, in nats. Computed
    in float64; a non-finite input gives a non-finite loss, which callers must not average away.

    Raises:
        ValueError: shapes differ, or beta is not positive.
    """
    columns = [
        np.asarray(column, dtype=np.float64)
        for column in (policy_chosen_P, policy_rejected_P, reference_chosen_P, reference_rejected_P)
    ]
    if len({column.shape for column in columns}) != 1 or columns[0].ndim != 1:
        raise ValueError(f"log-probs must have one shape [P], got {[column.shape for column in columns]}")
    if not beta > 0.0:
        raise ValueError(f"beta must be positive, got {beta}")
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = columns
    # The callers look for what is not finite; a NumPy warning beside their error would say nothing more.
    with np.errstate(invalid="ignore"):
        margin = beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected))
        # log(1 + e^-m) without overflow for either sign of m
        return PairLosses(margin, np.logaddexp(0.0, -margin))
