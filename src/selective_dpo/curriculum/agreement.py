"""How far seeds and evaluations agree about which pairs are hard."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from selective_dpo.criteria import CRITERIA
from selective_dpo.curriculum.records import LossTable, difficulty
from selective_dpo.curriculum.select import Rule, rank_window, ranks
from selective_dpo.errors import RecordsError
from selective_dpo.losses import LN_2
from selective_dpo.stats.bootstrap import (
    LEVEL,
    REPLICATES,
    Draws,
    bounds,
    cluster_bootstrap,
    cluster_codes,
    estimates,
    rows_for,
)
from selective_dpo.stats.estimates import Estimate, clustered_share, null_if_undefined
from selective_dpo.stats.rank_correlation import clustered_spearman, weighted_spearman

_MAX_BINS = 1 << 12

MIN_MOVEMENT = 0.005
"""In nats: a margin of 0.01, with which sigmoid(margin) says 49.75 to 50.25% of any label. In the demo's
world the movement is 0.07 (beta 0.5) to 0.6; 47 real pairs and 3 updates a scorer gave 0.0002, and seeds that
agreed to .32 ± .32."""

_COMPARED = ("spearman", "overlap", "jaccard")


def agreement(
    table: LossTable,
    how: str = "mean",
    rule: Rule | None = None,
    *,
    chance_loss: float | None = LN_2,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> dict[str, Any]:
    """Agreement statistics of a loss table, as JSON values; null where one is not defined.

    Over the `pairs` that have all records of the `columns` listed:

    - `spearman`: rank correlation between each two (seed, evaluation) columns, with its bounds;
    - `seeds`: for each two seeds, the Spearman correlation of their own difficulties (aggregated by
      `how`), and how far the sets A and B that `rule` selects by them coincide: `overlap`
      |A and B| / |A|, `jaccard` |A and B| / |A or B|. For rules that do not go by difficulty
      (`random`, `all`) the easiest half stands in; `fraction` is the share compared, null for `below`;
    - `movement`: the root mean square of all losses minus `chance_loss`, that of a policy that has not moved;
      half of a small margin, for DPO's own loss. Below `MIN_MOVEMENT` the scorers hardly moved. Null where
      `chance_loss` is None;
    - `above_chance`: the share of pairs whose difficulty (or mean loss, where that is no loss) is above
      `chance_loss`, that of a policy that has not moved (see `losses`), with the interval of
      `clustered_share`; null where `chance_loss` is None.

    Other errors and intervals come from the cluster bootstrap over prompts (see `bootstrap`): ranks
    and selected sets are found anew in each resample, a pair's difficulty is held as it is. Of tables
    of more than 400,000 / columns pairs the resamples hold that many; `clusters_drawn` says how many
    prompts. `seed` decides the resamples. The numbers themselves are always those of all pairs.
    """
    basis = _basis(table, how, rule or Rule(), math.inf if chance_loss is None else chance_loss)
    movement = None
    if chance_loss is not None and basis.losses_CP.size:
        movement = float(np.sqrt(np.mean((basis.losses_CP - chance_loss) ** 2)))
    draws = _draws(basis, replicates, seed)
    between = _between(len(basis.columns))
    low_K, high_K = bounds(draws)
    above = Estimate(math.nan, math.nan, math.nan, math.nan)
    if len(basis.prompt_P) > 1:
        above = clustered_share(basis.above_P, basis.prompt_P)
    numbers = iter(estimates(draws)[len(between) :])
    return {
        "pairs": len(basis.prompt_P),
        "columns": [{"seed": seed_, "evaluation": evaluation} for seed_, evaluation in basis.columns],
        "spearman": _matrix(draws.value_K, len(basis.columns)),
        "spearman_low": _matrix(low_K, len(basis.columns)),
        "spearman_high": _matrix(high_K, len(basis.columns)),
        "seeds": [
            {"a": a, "b": b, **{name: next(numbers).as_json() for name in _COMPARED}}
            for a, b in itertools.combinations(basis.seeds, 2)
        ],
        "chance_loss": chance_loss,
        "movement": movement,
        "above_chance": None if chance_loss is None else above.as_json(),
        "fraction": None if basis.window is None else round(basis.window[1] - basis.window[0], 12),
        "bootstrap": {
            "replicates": replicates,
            "clusters": draws.clusters,
            "level": LEVEL,
            **({} if draws.drawn is None else {"clusters_drawn": draws.drawn}),
        },
    }


MIN_CHECK = 0.5
"""Spearman's correlation of one-step with a trained pair of scorers below which it does not describe their
training. In eight of the demo's worlds it was .76 with a trained seed, and .38 where seeds trained at ten
times the learning rate (benchmarks/results/one_step.json)."""


def scorer_check(own: LossTable, trained: LossTable) -> dict[str, Any]:
    """How far one-step's difficulties agree with those of one seed of trained scorers, as JSON values.

    Over the pairs of `trained` that `own` has, too: `spearman` and `overlap`, the share of one easiest half
    that is in the other; `evaluations`, the rank correlation of the scorers' first with their last
    evaluation. Both share one training, so another training would agree less.

    Raises:
        RecordsError: they have fewer than two pairs in common.
    """
    known = {name: row for row, name in enumerate(own.pair_ids_P.tolist())}
    at = [row for row, name in enumerate(trained.pair_ids_P.tolist()) if name in known]
    if len(at) < 2:
        raise RecordsError("score.check has no pairs with one-step in common; raise its number")
    losses_PE = trained.losses_PSE[at].mean(axis=1)
    prompt_ids = trained.prompt_ids_P[at]
    ids = trained.pair_ids_P[at]
    theirs_P = losses_PE.mean(axis=1)
    own_P = own.losses_PSE[[known[name] for name in ids.tolist()]].mean(axis=(1, 2))
    half = len(at) // 2
    easy_P, own_easy_P = (ranks(values, ids) < half for values in (theirs_P, own_P))
    return {
        "pairs": len(at),
        "spearman": clustered_spearman(own_P, theirs_P, prompt_ids).as_json(),
        "overlap": clustered_share(own_easy_P[easy_P].astype(float), prompt_ids[easy_P]).as_json(),
        "evaluations": clustered_spearman(losses_PE[:, 0], losses_PE[:, -1], prompt_ids).as_json(),
    }


class _Basis(NamedTuple):
    """What every resample is computed from. Equal codes are tied values, higher codes higher values."""

    prompt_P: NDArray[np.intp]
    """The prompt of each pair, as a number."""
    columns: list[tuple[int, int]]
    """(seed, evaluation) of each loss column."""
    seeds: list[int]
    """Seeds whose own difficulties are compared."""
    codes_CP: NDArray[np.intp]
    """Of the loss columns, then of the seeds' own difficulties."""
    rank_SP: NDArray[np.intp]
    """Rank of each pair by each seed's own difficulty."""
    window: tuple[float, float] | None
    """Ranks that a seed selects, as shares of the pairs; None: by `kept_SP`."""
    kept_SP: NDArray[np.bool_]
    """Pairs up to the threshold, by each seed's own difficulty."""
    above_P: NDArray[np.bool_]
    losses_CP: NDArray[np.float64]

    def binned(self) -> _Basis:
        """The same with at most 4,096 bins a column, in two bytes each, so that lookups stay in the cache.

        A rank moves by at most 1 / 4,096 of the range, differently for each of more than 4,096 pairs: a
        correlation moves by about 1 / 4,096 of its own standard error.
        """
        codes_CP, rank_SP = (
            np.array([_binned(code_P) for code_P in codes]).reshape(codes.shape)
            for codes in (self.codes_CP, self.rank_SP)
        )
        return self._replace(codes_CP=codes_CP, rank_SP=rank_SP)

    def rows(self, rows_N: NDArray[np.intp]) -> _Basis:
        """The basis of some rows."""
        return self._replace(
            prompt_P=self.prompt_P[rows_N],
            codes_CP=self.codes_CP[:, rows_N].astype(np.intp),
            rank_SP=self.rank_SP[:, rows_N].astype(np.intp),
            kept_SP=self.kept_SP[:, rows_N],
        )


def _basis(table: LossTable, how: str, rule: Rule, chance_loss: float) -> _Basis:
    held_PSE = np.isfinite(table.losses_PSE)
    present_SE = np.asarray(held_PSE.any(axis=0))
    whole_P = np.asarray(held_PSE[:, present_SE].all(axis=1))
    whole = table if whole_P.all() else table.of_pairs(whole_P)
    seeds, own_SP = _own_difficulties(whole, present_SE, how)
    losses_CP = whole.losses_PSE[:, present_SE].T
    # Partial, because whole columns may be missing; the pairs compared have all records of the others.
    is_loss = CRITERIA[how].is_loss
    level_P = difficulty(whole, how, allow_partial=True).difficulty_P if is_loss else losses_CP.mean(axis=0)
    return _Basis(
        prompt_P=cluster_codes(whole.prompt_ids_P),
        columns=[(table.seeds_S[s], table.evaluations_E[e]) for s, e in np.argwhere(present_SE)],
        seeds=[table.seeds_S[s] for s in seeds],
        codes_CP=np.array(
            [np.unique(values_P, return_inverse=True)[1] for values_P in (*losses_CP, *own_SP)]
        ),
        rank_SP=np.array([ranks(own_P, whole.pair_ids_P) for own_P in own_SP], dtype=np.intp),
        window=_window(len(whole_P), rule),
        kept_SP=own_SP <= (np.inf if rule.threshold is None else rule.threshold),
        above_P=level_P > chance_loss,
        losses_CP=losses_CP,
    )


def _window(pairs: int, rule: Rule) -> tuple[float, float] | None:
    if rule.name == "below":
        return None
    low, high = rank_window(pairs, Rule("easiest") if rule.name in ("random", "all") else rule)
    return low / pairs, high / pairs


def _own_difficulties(
    table: LossTable, present_SE: NDArray[np.bool_], how: str
) -> tuple[list[int], NDArray[np.float64]]:
    """The seeds that have what the criterion reads, and the difficulties by each of them alone [S, P]."""
    seeds, own = [], []
    for s in np.flatnonzero(present_SE.any(axis=1)).tolist():
        with contextlib.suppress(RecordsError):  # such as the last evaluation, which this seed lacks
            own.append(difficulty(table.of_seed(s), how, allow_partial=True).difficulty_P)
            seeds.append(s)
    # The shape is given, because there may be no seed to read it off.
    return seeds, np.array(own).reshape(len(seeds), len(table.pair_ids_P))


def _binned(code_P: NDArray[np.intp]) -> NDArray[np.uint16]:
    distinct = int(code_P.max(initial=0)) + 1
    bin_P = code_P if distinct <= _MAX_BINS else code_P * _MAX_BINS // distinct
    return bin_P.astype(np.uint16)


def _draws(basis: _Basis, replicates: int, seed: int) -> Draws:
    if len(basis.prompt_P) < 2:
        statistics = len(_between(len(basis.columns))) + 3 * len(_between(len(basis.seeds)))
        nothing_K = np.full(statistics, np.nan)
        return Draws(nothing_K, np.tile(nothing_K, (replicates, 1)), len(basis.prompt_P))
    binned = basis.binned()
    return cluster_bootstrap(
        lambda weights_P: _statistics(basis, weights_P),
        basis.prompt_P,
        replicates=replicates,
        seed=seed,
        resampled=lambda rows_N, weights_N: _statistics(binned.rows(rows_N), weights_N),
        max_rows=rows_for(len(basis.codes_CP)),
    )


def _statistics(basis: _Basis, weights_P: NDArray[np.float64]) -> NDArray[np.float64]:
    """All statistics of the data in which each pair stands `weights_P` times.

    Order: Spearman of each two columns; for each two seeds Spearman, overlap, Jaccard.
    """
    spearman_CC = weighted_spearman(basis.codes_CP, weights_P)
    columns = len(basis.columns)
    copies_SP = _copies_selected(basis, weights_P)
    values = [spearman_CC[a, b] for a, b in _between(columns)]
    for a, b in _between(len(basis.seeds)):
        both = np.minimum(copies_SP[a], copies_SP[b]).sum()
        either = np.maximum(copies_SP[a], copies_SP[b]).sum()
        values += [spearman_CC[columns + a, columns + b]]
        values += [_ratio(both, copies_SP[a].sum()), _ratio(both, either)]
    return np.array(values, dtype=np.float64)


def _copies_selected(basis: _Basis, weights_P: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many of the copies of each pair each seed selects [S, P]."""
    if basis.window is None:
        return basis.kept_SP * weights_P
    copies_SP = np.empty(basis.rank_SP.shape)
    low, high = (share * weights_P.sum() for share in basis.window)
    for rank_P, copies_P in zip(basis.rank_SP, copies_SP, strict=True):
        weight_V = np.bincount(rank_P, weights_P)
        end_V = np.cumsum(weight_V)
        inside_V = np.clip(np.minimum(end_V, high) - np.maximum(end_V - weight_V, low), 0.0, None)
        share_V = np.divide(inside_V, weight_V, out=np.zeros_like(inside_V), where=weight_V > 0)
        np.multiply(share_V[rank_P], weights_P, out=copies_P)
    return copies_SP


def _between(items: int) -> Sequence[tuple[int, int]]:
    return list(itertools.combinations(range(items), 2))


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else math.nan


def _matrix(values_K: NDArray[np.float64], columns: int) -> list[list[float | None]]:
    """The symmetric matrix whose upper triangle stands first in `values_K`, with ones on the diagonal."""
    matrix: list[list[float | None]] = [[1.0] * columns for _ in range(columns)]
    for (a, b), value in zip(_between(columns), values_K.tolist(), strict=False):
        matrix[a][b] = matrix[b][a] = null_if_undefined(value)
    return matrix
