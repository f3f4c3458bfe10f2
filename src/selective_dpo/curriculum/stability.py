"""Would a fresh repetition of the scoring select the same pairs?

The records of k seeds give the overlap between the sets that single seeds select. From it follows how
far the set selected by the mean of all k would coincide with that of k fresh seeds, or of one:

1. The overlap observed between seeds, at the selection in use, gives the correlation rho of two seeds'
   difficulties as bivariate normal variables (`latent_correlation`).
2. The formula of Spearman and Brown turns it into the correlation between means over seeds.
3. That is turned back into an overlap.

Seeds are the units: the evaluations of one seed share its scorers, so they are aggregated first.
docs/protocols.md has the errors measured on real records, and the limits.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from selective_dpo.curriculum.records import LossTable, difficulty
from selective_dpo.curriculum.select import Rule, rank_window, ranks, size_of, up_to_threshold
from selective_dpo.errors import ConfigError, RecordsError
from selective_dpo.stats.bootstrap import LEVEL, REPLICATES, Draws, cluster_bootstrap, cluster_codes, rows_for
from selective_dpo.stats.estimates import Estimate, null_if_undefined
from selective_dpo.stats.latent_correlation import OverlapCurve, correlation_of_means, overlap_curve

TARGET = 0.95
"""Overlap that the protocol `certified` asks of the interval's lower end before it stops adding seeds."""

SEED_NOISE_FREEDOM = 12.0
"""How much seeds differ in the variance of their noise: as chi-squares of that many degrees of freedom,
each over its mean; a coefficient of variation of sqrt(2 / 12) = 0.41. Two or three seeds cannot tell, so
it is a constant, on the wide side of what the original authors' records show (docs/protocols.md)."""

_SIMULATIONS = 10_000


class SeedOverlap(NamedTuple):
    """How far the sets selected by two seeds alone coincide."""

    a: int
    b: int
    overlap: float
    """|A and B| over the mean of |A| and |B|."""


class Prediction(NamedTuple):
    """What the records of some seeds say about fresh ones; `predict_overlap` explains the intervals."""

    seeds: int
    """How many there are records of (k)."""
    observed: tuple[SeedOverlap, ...]
    quantiles: tuple[float, float]
    """The easiest and the hardest quantile selected, as shares of the pairs."""
    rho: float
    """Latent correlation between two seeds; NaN where the selection does not depend on difficulty."""
    repetition: Estimate
    """Overlap of the set selected by the mean of these k seeds with that of k fresh ones."""
    single: Estimate
    """Overlap of the same set with that of one fresh seed."""
    pairs: int
    clusters: int
    """Prompts."""
    replicates: int
    """Of the bootstrap; 0 where there was nothing to resample."""

    def at_seeds(self, seeds: int, others: int | None = None) -> float:
        """Predicted overlap of the selection by `seeds` seeds with that by `others` (as many) fresh ones."""
        if math.isnan(self.rho):
            return 1.0
        rho = correlation_of_means(self.rho, seeds, others or seeds)
        return float(overlap_curve(*self.quantiles).overlap(rho))

    def as_json(self) -> dict[str, Any]:
        """JSON values, NaN as null."""
        return {
            **self._asdict(),
            "observed": [each._asdict() for each in self.observed],
            "quantiles": list(self.quantiles),
            "rho": null_if_undefined(self.rho),
            "repetition": self.repetition.as_json(),
            "single": self.single.as_json(),
        }


def predict_overlap(
    table: LossTable,
    how: str = "mean",
    rule: Rule | None = None,
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Prediction:
    """Predict how far the set that `rule` selects from these records would coincide with fresh ones.

    `how` makes each seed's own difficulties from its evaluations; pairs that lack records are left out.
    Equal difficulties are ranked by pair id, always the same way, as they are in the selection itself.
    `below` has no fixed size: each seed selects by the threshold, and the mean share stands for the
    quantile, so that a shift of a seed's losses counts as its noise. `all`, `random` (whose draw knows
    only ids and its own seed) and sizes that keep every pair are stable by construction: 1.

    The intervals, of level 95%, are for the overlap that would be observed on these pairs. They hold
    three sources of error: the overlap known is that of so many prompts (cluster bootstrap), the fresh
    one will be so too (a second, independent draw), and seeds are unequally noisy
    (`SEED_NOISE_FREEDOM`). `standard_error` is the standard deviation of the same simulations. Where no
    pair is in dispute a bootstrap has nothing to vary; draws from the posterior of a share of 0 under
    Jeffreys' prior take its place. With one prompt only, errors and bounds are NaN.

    All this assumes that a seed's noise is drawn for each prompt alone. What all pairs of one seed share,
    such as how much its scorers like long answers, is not in the intervals: where that made half of the
    noise, they held what was observed in 56 to 82% of the cases (benchmarks/certified.py).

    Of tables of more than 400,000 / k pairs the resamples hold that many (see `bootstrap`). Deterministic
    given `seed`.

    Raises:
        RecordsError: records of fewer than two seeds, or no pair that has all of them.
        ConfigError: the rule's setting does not fit these pairs, or no seed selects any pair.
    """
    rule = rule or Rule()
    sets = seed_sets(table, how, rule)
    low, high = sets.quantiles
    if rule.name in ("all", "random") or high - low == 1.0:
        return _stable_by_construction(table, sets)
    binned = sets.binned()
    draws = cluster_bootstrap(
        lambda weights_P: np.array([mean_overlap(sets, weights_P)]),
        sets.prompt_P,
        replicates=replicates,
        seed=seed,
        resampled=lambda rows_N, weights_N: np.array([mean_overlap(binned.rows(rows_N), weights_N)]),
        max_rows=rows_for(sets.seeds),
    )
    curve = overlap_curve(low, high)
    rho = float(curve.correlation(draws.value_K[0]))
    drawn_R = curve.correlation(_overlaps_drawn(draws, high - low, seed))
    return Prediction(
        seeds=sets.seeds,
        observed=_observed(table, sets),
        quantiles=sets.quantiles,
        rho=rho,
        repetition=_estimate(rho, drawn_R, curve, sets.seeds, sets.seeds, seed),
        single=_estimate(rho, drawn_R, curve, sets.seeds, 1, seed),
        pairs=sets.pairs,
        clusters=draws.clusters,
        replicates=replicates,
    )


def is_stable(prediction: Prediction, target: float = TARGET) -> bool:
    """Whether `certified` may stop: the lower end of the interval of a repetition reaches `target`.

    By the prediction itself a third of the runs that stop would be below their target. One whose interval
    is not known (NaN) never may. It rests on what the interval assumes (see `predict_overlap`).

    Raises:
        ConfigError: the target is not in (0, 1].
    """
    return bool(prediction.repetition.low >= _valid(target))


def seeds_needed(prediction: Prediction, target: float = TARGET) -> int | None:
    """Fewest seeds whose selection is predicted to overlap by `target` with that of as many fresh ones.

    By the prediction itself; `is_stable` asks for more, so `certified` may take more seeds than these.
    None where no number would do: the seeds agree no better than chance, or the target is 1 and they
    agree less. It may be 1; that knowing it takes two seeds is for the protocol to add.

    Raises:
        ConfigError: the target is not in (0, 1].
    """
    target = _valid(target)
    if math.isnan(prediction.rho):
        return 1
    rho, wanted = prediction.rho, float(overlap_curve(*prediction.quantiles).correlation(target))
    if wanted <= rho:
        return 1
    if rho == 0.0 or wanted == 1.0:
        return None
    # k rho / (1 + (k - 1) rho) >= wanted, solved for k; what rounding adds must not cost a seed.
    return math.ceil(wanted * (1 - rho) / (rho * (1 - wanted)) - 1e-9)


def _stable_by_construction(table: LossTable, sets: SeedSets) -> Prediction:
    certain = Estimate(1.0, 0.0, 1.0, 1.0)
    return Prediction(
        seeds=sets.seeds,
        observed=tuple(SeedOverlap(a, b, 1.0) for a, b in itertools.combinations(table.seeds_S, 2)),
        quantiles=sets.quantiles,
        rho=math.nan,
        repetition=certain,
        single=certain,
        pairs=sets.pairs,
        clusters=len(np.unique(sets.prompt_P)),
        replicates=0,
    )


def _observed(table: LossTable, sets: SeedSets) -> tuple[SeedOverlap, ...]:
    once_P = np.ones(sets.pairs)
    return tuple(
        SeedOverlap(table.seeds_S[a], table.seeds_S[b], mean_overlap(sets.take(a, b), once_P))
        for a, b in itertools.combinations(range(sets.seeds), 2)
    )


def _overlaps_drawn(draws: Draws, share: float, seed: int) -> NDArray[np.float64]:
    """Overlaps between seeds that the data leave possible; none where they say nothing about it."""
    drawn_R = draws.draws_RK[:, 0]
    drawn_R = drawn_R[np.isfinite(drawn_R)]
    if draws.clusters < 2 or 2 * len(drawn_R) < len(draws.draws_RK):
        return np.empty(0)
    if draws.value_K[0] == 1.0:
        selected = draws.clusters * share
        drawn_R = 1.0 - np.random.default_rng([seed, 1]).beta(0.5, selected + 0.5, size=len(drawn_R))
    return drawn_R


def _estimate(
    rho: float, drawn_R: NDArray[np.float64], curve: OverlapCurve, seeds: int, others: int, seed: int
) -> Estimate:
    value = float(curve.overlap(correlation_of_means(rho, seeds, others)))
    if not len(drawn_R):
        return Estimate(value, math.nan, math.nan, math.nan)
    generator = np.random.default_rng([seed, 2])
    known_N, fresh_N = drawn_R[generator.integers(len(drawn_R), size=(2, _SIMULATIONS))]
    # Mean noise variance of the fresh seeds over that of the known ones: a ratio of chi-squares.
    noise_ratio_N = generator.f(SEED_NOISE_FREEDOM * others, SEED_NOISE_FREEDOM * seeds, size=_SIMULATIONS)
    expected_N = curve.overlap(correlation_of_means(known_N, seeds, others, noise_ratio_N))
    chance_N = curve.overlap(correlation_of_means(fresh_N, seeds, others)) - value
    simulated_N = np.clip(expected_N + chance_N, 0.0, 1.0)
    low, high = np.quantile(simulated_N, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(simulated_N.std(ddof=1)), min(value, float(low)), max(value, float(high)))


def _valid(target: float) -> float:
    if not 0.0 < target <= 1.0:
        raise ConfigError(f"the target overlap is {target}; it must be above 0 and at most 1")
    return target


# --- The sets of pairs that single seeds would select, and how far they coincide --------------------------


_MAX_BINS = 1 << 16


class SeedSets(NamedTuple):
    """What each seed selects, in a form that weights of the pairs can be put on."""

    prompt_P: NDArray[np.intp]
    """The prompt of each pair, as a number."""
    code_SP: NDArray[np.intp]
    """Rank of each pair by each seed's own difficulty, or its bin of ranks."""
    kept_SP: NDArray[np.bool_] | None
    """Pairs up to the threshold, for `below`; else sets follow from `code_SP` and `quantiles`."""
    quantiles: tuple[float, float]
    """The easiest and the hardest quantile selected, as shares of the pairs."""

    @property
    def seeds(self) -> int:
        """How many (S)."""
        return len(self.code_SP)

    @property
    def pairs(self) -> int:
        """How many (P)."""
        return len(self.prompt_P)

    def take(self, *seeds: int) -> SeedSets:
        """Those of some seeds, by index."""
        rows = list(seeds)
        kept_SP = None if self.kept_SP is None else self.kept_SP[rows]
        return self._replace(code_SP=self.code_SP[rows], kept_SP=kept_SP)

    def rows(self, rows_N: NDArray[np.intp]) -> SeedSets:
        """Those of some pairs, by row."""
        kept_SN = None if self.kept_SP is None else self.kept_SP[:, rows_N]
        return self._replace(prompt_P=self.prompt_P[rows_N], code_SP=self.code_SP[:, rows_N], kept_SP=kept_SN)

    def binned(self) -> SeedSets:
        """The same with at most 65,536 bins of ranks a seed, so that a resample's sums fit the cache.

        The edge of a resample's set moves by at most half a bin, 1 / 131,072 of the pairs.
        """
        if self.pairs <= _MAX_BINS:
            return self
        return self._replace(code_SP=self.code_SP * _MAX_BINS // self.pairs)


def seed_sets(table: LossTable, how: str, rule: Rule) -> SeedSets:
    """What `rule` selects by each seed's own difficulty, over the pairs that have all records.

    Raises:
        RecordsError: records of fewer than two seeds, or no pair that has all of them.
        ConfigError: the rule's setting does not fit these pairs, or no seed selects any pair.
    """
    if len(table.seeds_S) < 2:
        raise RecordsError("a prediction of stability needs the records of at least two seeds: score another")
    whole_P = np.asarray(np.isfinite(table.losses_PSE).all(axis=(1, 2)))
    if not whole_P.any():
        raise RecordsError("no pair has the records of all seeds: finish the scoring first")
    whole = table.of_pairs(whole_P)
    own_SP = np.array([difficulty(whole.of_seed(s), how).difficulty_P for s in range(len(table.seeds_S))])
    code_SP = np.array([ranks(own_P, whole.pair_ids_P) for own_P in own_SP], dtype=np.intp)
    pairs, kept_SP = len(whole.pair_ids_P), None
    if rule.name == "below":
        kept_SP = up_to_threshold(own_SP, rule)
        quantiles = 0.0, float(kept_SP.mean())
    else:
        first, stop = (0, size_of(pairs, rule)) if rule.name == "random" else rank_window(pairs, rule)
        quantiles = first / pairs, stop / pairs
    return SeedSets(cluster_codes(whole.prompt_ids_P), code_SP, kept_SP, quantiles)


def mean_overlap(sets: SeedSets, weights_P: NDArray[np.float64]) -> float:
    """Mean overlap of any two seeds' sets when pair p stands weights_P[p] times; NaN if all are empty.

    A pair selected by c of the k seeds is shared by c (c - 1) / 2 of their k (k - 1) / 2 couples, so
    one histogram of c serves all couples: sum c (c - 1) / ((k - 1) sum c), the positive agreement of k
    raters (Fleiss, Levin and Paik 2003, "Statistical Methods for Rates and Proportions", chapter 18).
    For sets of unequal size it stands for |A and B| over the mean of |A| and |B|.
    """
    times_P = np.zeros(sets.pairs, dtype=np.intp)
    edges = np.array(sets.quantiles) * weights_P.sum()
    for s, code_P in enumerate(sets.code_SP):
        if sets.kept_SP is not None:
            times_P += sets.kept_SP[s]
            continue
        weight_V = np.bincount(code_P, weights_P)
        # A pair is inside when the middle of its copies is: with weights of one, exactly the rule's set.
        first, stop = np.searchsorted(np.cumsum(weight_V) - weight_V / 2, edges)
        times_P += (code_P >= first) & (code_P < stop)
    weight_C = np.bincount(times_P, weights_P)
    count_C = np.arange(len(weight_C))
    selections = float(weight_C @ count_C)
    shared = float(weight_C @ (count_C * (count_C - 1)))
    return shared / ((sets.seeds - 1) * selections) if selections > 0 else math.nan
