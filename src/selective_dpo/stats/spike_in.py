"""How well a score finds labels that were turned round on purpose, and where false alarms stay rare.

Some pairs are *planted*: measured with chosen and rejected exchanged. All others keep their label. Planted
pairs are known to differ from the data's own labels, so finding them can be counted. What the counts are
relative to is the data's own labels: a pair whose own label is wrong counts as a false alarm here when it is
flagged. So precision and the bound on false alarms are pessimistic about flags, while planted errors, which
strike clear pairs and close ones alike, are easier to find than annotators' errors, which strike close ones.

Dimension suffixes: P pairs, V distinct scores from the largest to the smallest, K sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta

from selective_dpo.stats.bootstrap import cluster_bootstrap, estimates, rows_for
from selective_dpo.stats.estimates import Estimate

Floats = NDArray[np.float64]

FLAGGED_SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Shares of the pairs, those with the largest scores, that `limit_false_alarms` tries to flag. They are fixed
beforehand, since it pays for each one with confidence."""

CONFIDENCE = 0.9


class SpikeIn(NamedTuple):
    """How well planted pairs are found; intervals are over prompts."""

    auroc: Estimate
    """Probability that a planted pair scores above another one; one half for equal scores."""
    precision: dict[int, Estimate]
    """For each k, the share of planted pairs among the k with the largest scores."""


class Limit(NamedTuple):
    """The largest set of flagged pairs whose share of false alarms is below the bound."""

    threshold: float
    """Pairs that score at least this are flagged."""
    flagged: int
    false_alarms: float
    """Share of the flagged pairs that were not planted."""
    upper: float
    """Upper confidence limit of that share, for pairs like these."""


def plant(pair_ids_P: ArrayLike, share: float, seed: int) -> NDArray[np.bool_]:
    """A random share of the pairs, at least one: [P]. Which ones depends on the ids, not on their order.

    Raises:
        ValueError: no pairs, or a share that is not above 0 and below 1.
    """
    ids = np.asarray(pair_ids_P)
    if not len(ids) or not 0.0 < share < 1.0:
        raise ValueError(f"cannot plant a share of {share:g} among {len(ids)} pairs")
    planted_P = np.zeros(len(ids), dtype=np.bool_)
    drawn = np.random.default_rng(seed).permutation(len(ids))[: max(1, round(share * len(ids)))]
    planted_P[np.argsort(ids, kind="stable")[drawn]] = True
    return planted_P


def measure_spike_in(
    score_P: ArrayLike, planted_P: ArrayLike, clusters_P: ArrayLike, sizes: Sequence[int], *, seed: int = 0
) -> SpikeIn:
    """AUROC and precision among the first k pairs, with 95% intervals by the bootstrap over prompts.

    AUROC is the statistic of Mann and Whitney (1947). Of pairs with equal scores at the end of the first k,
    as many as there is room for count, each in its share: that is the mean over all orders of them.

    Args:
        score_P: larger where the label looks more wrong, of a planted pair under its planted label. [P]
        planted_P: bool [P]; some pairs are planted, and some are not.
        clusters_P: the pairs' prompts [P].
        sizes: values of k, none above P.

    Raises:
        ValueError: none or all are planted, or a k is out of range.
    """
    planted = np.asarray(planted_P, dtype=np.bool_)
    if planted.all() or not planted.any():
        raise ValueError("some of the pairs must be planted, and some must not")
    if not all(1 <= size <= len(planted) for size in sizes):
        raise ValueError(f"sizes {list(sizes)} must be between 1 and {len(planted)}")
    values, place_P = np.unique(-np.asarray(score_P, dtype=np.float64), return_inverse=True)

    def statistic(weights_P: Floats) -> Floats:
        planted_V, others_V = (
            np.bincount(place_P, weights_P * which, minlength=len(values)) for which in (planted, ~planted)
        )
        found_V, flagged_V = np.cumsum(planted_V), np.cumsum(planted_V + others_V)
        # Of a resample the same share, since it need not hold as many pairs.
        sizes_K = np.asarray(sizes) * (flagged_V[-1] / len(planted))
        precision_K = np.interp(sizes_K, [0.0, *flagged_V], [0.0, *found_V]) / sizes_K
        below_V = others_V.sum() - np.cumsum(others_V)
        with np.errstate(invalid="ignore"):  # a resample may lack one kind: NaN
            auroc = (planted_V * (below_V + 0.5 * others_V)).sum() / (planted_V.sum() * others_V.sum())
        return np.asarray([auroc, *precision_K])

    most = rows_for(1 + len(sizes))
    auroc, *precision = estimates(cluster_bootstrap(statistic, clusters_P, seed=seed, max_rows=most))
    return SpikeIn(auroc, dict(zip(sizes, precision, strict=True)))


def limit_false_alarms(
    score_P: ArrayLike,
    planted_P: ArrayLike,
    clusters_P: ArrayLike,
    bound: float,
    *,
    confidence: float = CONFIDENCE,
    shares: Sequence[float] = FLAGGED_SHARES,
) -> Limit | None:
    """Where to flag pairs so that the share of false alarms among the flagged stays at or below `bound`.

    With probability `confidence` at least, over the pairs and over which are planted, the false discovery
    rate at the threshold that is returned is no larger than `bound`, for pairs like these with as large a
    share planted. None: no threshold is known to keep it.

    Of the thresholds that flag each of `shares`, the lowest one is taken whose upper confidence limit keeps
    the bound. The limits hold together (Bonferroni), so the choice among them costs nothing more: "learn then
    test" (Angelopoulos et al. 2021, arXiv 2110.01052), as for selective classification (Geifman and El-Yaniv
    2017, arXiv 1705.08500). Each limit is Clopper and Pearson's (1934) with the number of flagged pairs n
    replaced by n^2 / sum_g n_g^2 over prompts g, the effective size where pairs of a prompt are alike (Korn
    and Graubard 1998, Survey Methodology 24).

    Shapes and arguments as for `measure_spike_in`.
    """
    scores, planted = np.asarray(score_P, dtype=np.float64), np.asarray(planted_P, dtype=np.bool_)
    prompts = np.asarray(clusters_P)
    falling = np.sort(scores)[::-1]
    level = 1.0 - (1.0 - confidence) / len(shares)
    found = None
    for share in sorted(shares):
        threshold = float(falling[max(1, round(share * len(scores))) - 1])
        flagged_P = scores >= threshold
        wrong = float((~planted[flagged_P]).mean())
        sizes_G = np.unique(prompts[flagged_P], return_counts=True)[1]
        effective = float(sizes_G.sum() ** 2 / (sizes_G**2).sum())
        alarms = wrong * effective
        upper = 1.0 if wrong == 1.0 else float(beta.ppf(level, alarms + 1.0, effective - alarms))
        if upper <= bound:
            found = Limit(threshold, int(flagged_P.sum()), wrong, upper)
    return found


def false_discovery_rate(own_P: ArrayLike, share: float, threshold: float) -> float:
    """Share of false alarms among flagged pairs, if each pair were planted with probability `share`.

    `own_P` [P] are probabilities that scores are made of: a planted pair's is 1 - its own. Without a draw of
    the planted ones, this is what `limit_false_alarms` bounds. NaN where nothing is flagged.
    """
    own = np.asarray(own_P, dtype=np.float64)
    alarms = (1.0 - share) * float((own >= threshold).mean())
    flagged = alarms + share * float((1.0 - own >= threshold).mean())
    return alarms / flagged if flagged else float("nan")
