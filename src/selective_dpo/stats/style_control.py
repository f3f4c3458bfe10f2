"""Win rates at equal style: what judges think of answers beyond their length and their Markdown.

As Arena-Hard has it (https://github.com/lmarena/arena-hard-auto, `show_result.py`):

    logit P(the model's answer is preferred) = quality + sum over features f of slope_f * style_f

Shapes: R comparisons, A models, F features, K = A + F coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from selective_dpo.stats.bootstrap import cluster_bootstrap, cluster_codes, estimates
from selective_dpo.stats.estimates import Estimate
from selective_dpo.stats.length_control import logistic_fit

FEATURES = ("length", "headers", "lists", "bold")
REPLICATES = 200


class StyleControlled(NamedTuple):
    """A model's win rate where all answers have the mean style of those compared."""

    win_rate: Estimate
    first_minus: Estimate | None
    """The first model's win rate at equal style minus this one's; None for the first."""


def style_features(counts_R4: ArrayLike, baseline_R4: ArrayLike) -> NDArray[np.float64]:
    """The difference in style of each two answers, [R, 4]: length, then density of headers, lists and bold.

    Shapes: [R, 4] both: tokens, headers, list items, bold passages. Of length it is (a - b) / (a + b), of
    densities a and b, which are counts by token, (a - b) / (a + b + 1).
    """
    own_R4, other_R4 = (np.array(counts, dtype=np.float64) for counts in (counts_R4, baseline_R4))
    for counts in (own_R4, other_R4):
        counts[:, 0] = np.maximum(counts[:, 0], 1.0)  # an empty answer
        counts[:, 1:] /= counts[:, :1]
    added_4 = np.array([0.0, 1.0, 1.0, 1.0])
    return np.asarray((own_R4 - other_R4) / (own_R4 + other_R4 + added_4))


def markdown_counts(metadata: Mapping[str, Any]) -> list[float]:
    """Tokens, headers, list items and bold passages of an answer, from the `metadata` that Arena-Hard counts.

    Raises:
        KeyError, TypeError, AttributeError: they are not of that shape.
    """
    parts = (metadata[name] for name in ("header_count", "list_count", "bold_count"))
    return [float(metadata["token_len"]), *(float(sum(part.values())) for part in parts)]


def style_control(
    scores_R: ArrayLike,
    models_R: Sequence[str],
    features_RF: ArrayLike,
    clusters_R: ArrayLike,
    *,
    models: Sequence[str],
    replicates: int = REPLICATES,
) -> dict[str, StyleControlled]:
    """Win rates of `models` against one baseline at equal style; the slopes of style are shared by them.

    Features are standardised over the comparisons. Intervals are a bootstrap over the clusters, which are
    questions; features that do not vary are left out.
    """
    features = np.asarray(features_RF, dtype=np.float64)
    features = features[:, features.std(axis=0) > 0]
    style_RF = (features - features.mean(axis=0)) / features.std(axis=0)
    is_of_RA = np.asarray(models_R)[:, None] == np.asarray(models)[None]
    x_RK, y_R = np.concatenate([is_of_RA, style_RF], axis=1), np.asarray(scores_R, dtype=np.float64)
    none_K = np.zeros(x_RK.shape[1])
    whole_K = logistic_fit(x_RK, y_R, np.ones(len(y_R)), none_K, none_K)

    def statistic(weights_R: NDArray[np.float64]) -> NDArray[np.float64]:
        rate_A = expit(logistic_fit(x_RK, y_R, weights_R, whole_K, none_K)[: len(models)])
        return np.concatenate([rate_A, rate_A[0] - rate_A])

    found = estimates(cluster_bootstrap(statistic, cluster_codes(clusters_R), replicates=replicates))
    return {
        model: StyleControlled(found[place], found[len(models) + place] if place else None)
        for place, model in enumerate(models)
    }
