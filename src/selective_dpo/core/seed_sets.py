"""The sets of pairs that single seeds would select, and how far they coincide."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from selective_dpo.core.aggregation import difficulty
from selective_dpo.core.bootstrap import cluster_codes
from selective_dpo.core.records import LossTable
from selective_dpo.core.selection import Rule, rank_window, ranks, size_of
from selective_dpo.errors import ConfigError, RecordsError

_MOST_BINS = 1 << 16


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
        if self.pairs <= _MOST_BINS:
            return self
        return self._replace(code_SP=self.code_SP * _MOST_BINS // self.pairs)


def seed_sets(table: LossTable, how: str, rule: Rule) -> SeedSets:
    """What `rule` selects by each seed's own difficulty, over the pairs that have all records.

    Raises:
        RecordsError: records of fewer than two seeds, or no pair that has all of them.
        ConfigError: the rule's setting is missing or out of range, or no seed selects any pair.
    """
    if len(table.seeds_S) < 2:
        raise RecordsError("a prediction of stability needs the records of at least two seeds: score another")
    whole_P = np.isfinite(table.losses_PSE).all(axis=(1, 2))
    if not whole_P.any():
        raise RecordsError("no pair has the records of all seeds: finish the scoring first")
    whole = replace(
        table,
        pair_ids_P=table.pair_ids_P[whole_P],
        prompt_ids_P=table.prompt_ids_P[whole_P],
        losses_PSE=table.losses_PSE[whole_P],
    )
    own_SP = np.array([_own_difficulty(whole, s, how) for s in range(len(table.seeds_S))])
    code_SP = np.array([ranks(own_P, whole.pair_ids_P) for own_P in own_SP], dtype=np.intp)
    kept_SP = _up_to_threshold(own_SP, rule) if rule.name == "below" else None
    if kept_SP is None:
        low, high = _window(len(whole.pair_ids_P), rule)
    else:
        low, high = 0.0, float(kept_SP.mean())
    return SeedSets(cluster_codes(whole.prompt_ids_P), code_SP, kept_SP, (low, high))


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


def _own_difficulty(table: LossTable, s: int, how: str) -> NDArray[np.float64]:
    alone = replace(table, seeds_S=table.seeds_S[s : s + 1], losses_PSE=table.losses_PSE[:, s : s + 1])
    return difficulty(alone, how).difficulty_P


def _window(pairs: int, rule: Rule) -> tuple[float, float]:
    first, stop = (0, size_of(pairs, rule)) if rule.name == "random" else rank_window(pairs, rule)
    return first / pairs, stop / pairs


def _up_to_threshold(own_SP: NDArray[np.float64], rule: Rule) -> NDArray[np.bool_]:
    if rule.threshold is None or not math.isfinite(rule.threshold):
        raise ConfigError("rule 'below' needs a threshold: set select.threshold, such as 0.693")
    kept_SP = own_SP <= rule.threshold
    if not kept_SP.any():
        raise ConfigError(f"no seed has a pair at or below select.threshold {rule.threshold:g}: raise it")
    return kept_SP
