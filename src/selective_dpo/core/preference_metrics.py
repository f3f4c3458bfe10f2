"""How well a policy's implicit reward agrees with the labels of preference pairs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from selective_dpo.core.estimates import Estimate, clustered_mean, clustered_share


class PreferenceMetrics(NamedTuple):
    """Means over pairs, each with its uncertainty clustered by prompt."""

    pairs: int
    prompts: int
    loss: Estimate
    """The trained loss; DPO's own, in nats, where that is not pairwise (see `core.losses`)."""
    accuracy: Estimate
    """Share of pairs with a margin above 0; a margin of exactly 0 counts one half."""
    margin: Estimate
    """Beta times the difference of the chosen and rejected log-ratios."""


def preference_metrics(loss_P: ArrayLike, margin_P: ArrayLike, prompt_ids_P: ArrayLike) -> PreferenceMetrics:
    """Loss, accuracy and margin of P pairs.

    Shapes: loss_P, margin_P [P] float; prompt_ids_P [P] strings, equal for pairs of one prompt. A tie
    counts one half because a policy that has not moved from its reference must score chance, 0.5.

    Raises:
        ValueError: no pairs, shapes that differ, or a value that is not finite.
    """
    loss, margin = np.asarray(loss_P, dtype=np.float64), np.asarray(margin_P, dtype=np.float64)
    prompt_ids = np.asarray(prompt_ids_P)
    if not (np.isfinite(loss).all() and np.isfinite(margin).all()):
        raise ValueError("losses and margins must be finite: leaving pairs out would change the mean")
    accuracy = np.heaviside(margin, 0.5)
    return PreferenceMetrics(
        pairs=loss.size,
        prompts=len(np.unique(prompt_ids)),
        loss=clustered_mean(loss, prompt_ids),
        accuracy=clustered_share(accuracy, prompt_ids),
        margin=clustered_mean(margin, prompt_ids),
    )
