"""Selection that holds something still: the easiest share within strata, minimum shares, length taken out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from scipy.stats import spearmanr

from selective_dpo.config import SelectConfig
from selective_dpo.curriculum.select import Rule, Selection, ranks, size_of
from selective_dpo.errors import ConfigError, name_some
from selective_dpo.identity import positions_of

BINS = 5
"""Quantile bins of a length or score difference."""


class Attributes(NamedTuple):
    """What is known of P pairs beside their difficulty."""

    length_P: NDArray[np.int64]
    """Tokens of chosen minus those of rejected."""
    source_P: NDArray[np.str_]
    """Where the pair comes from, as the data's sources are named."""
    score_P: NDArray[np.float64]
    """`score_chosen` minus `score_rejected`; NaN where the data has none."""


def read_attributes(pairs: Path, pair_ids_P: Sequence[str]) -> Attributes:
    """Attributes of these pairs from a run's `pairs.parquet`.

    Raises:
        IdentityError: a pair is not in it.
    """
    columns = ["chosen_tokens", "rejected_tokens", "source", "score_chosen", "score_rejected"]
    table = pq.read_table(pairs, columns=["pair_id", *columns], filters=pc.field("status") == "kept")
    at_P = positions_of(list(pair_ids_P), table["pair_id"].to_pylist(), what="curriculum and pairs.parquet")
    chosen, rejected, source, *scores = (table[name].take(pa.array(at_P)) for name in columns)
    better_P, worse_P = (np.asarray(score.to_numpy(), dtype=np.float64) for score in scores)
    length_P = np.asarray(chosen.to_numpy(), dtype=np.int64) - rejected.to_numpy()
    return Attributes(length_P, np.array(source.to_pylist(), dtype=np.str_), better_P - worse_P)


def needs_attributes(config: SelectConfig) -> bool:
    """Whether a selection goes by more than difficulty."""
    return bool(config.balance or config.quota or config.residual)


def require_attributes(config: SelectConfig, attributes: Attributes) -> None:
    """Refuse a selection whose attributes these pairs lack, or all share.

    Raises:
        ConfigError: with the remedy.
    """
    sources = sorted(set(attributes.source_P.tolist()))
    without = int(np.isnan(attributes.score_P).sum())
    if "score" in config.balance and without:
        raise ConfigError(
            f"select.balance has score, but {without:,} of {len(attributes.score_P):,} pairs have no "
            "score_chosen and score_rejected: leave score out, or name the columns in data.train.columns"
        )
    if "source" in config.balance and len(sources) == 1:
        raise ConfigError("select.balance has source, but all pairs are of one source: leave it out")
    if unknown := sorted(set(config.quota) - set(sources)):
        raise ConfigError(
            f"select.quota names {unknown[0]!r}, which is no source of these pairs: there are "
            f"{name_some(sources)}"
        )


def residual(difficulty_P: NDArray[np.float64], length_P: NDArray[np.int64]) -> NDArray[np.float64]:
    """Difficulty less what the length difference says of it: isotonic regression's residuals, plus the mean.

    The regression falls or rises as the rank correlation does. It is least squares under monotony (Barlow et
    al. 1972, "Statistical inference under order restrictions"), by SciPy. difficulty_P and length_P [P].
    """
    values_L, at_P, counts_L = np.unique(length_P, return_inverse=True, return_counts=True)
    if len(values_L) == 1:
        return difficulty_P.copy()
    means_L = np.bincount(at_P, weights=difficulty_P) / counts_L
    rises = bool(spearmanr(length_P, difficulty_P).statistic >= 0)
    fitted_L = isotonic_regression(means_L, weights=counts_L, increasing=rises).x
    left_P = difficulty_P - fitted_L[at_P] + difficulty_P.mean()
    # Pairs that are equal but for rounding are to be ranked by id, on every machine.
    return np.asarray(np.round(left_P, 12), dtype=np.float64)


def strata(attributes: Attributes, by: Sequence[str]) -> NDArray[np.int64]:
    """Stratum [P] of each pair, from 0: fifths of length and score difference, and the source, crossed."""
    columns = {"length": attributes.length_P.astype(np.float64), "score": attributes.score_P}
    parts = [
        np.unique(attributes.source_P, return_inverse=True)[1] if name == "source" else _fifths(columns[name])
        for name in by
    ]
    return np.asarray(np.unique(np.stack(parts), axis=1, return_inverse=True)[1].reshape(-1), dtype=np.int64)


def _fifths(values_P: NDArray[np.float64]) -> NDArray[np.int64]:
    edges = np.quantile(values_P, np.arange(1, BINS) / BINS)
    return np.asarray(np.searchsorted(np.unique(edges), values_P, side="right"), dtype=np.int64)


def shares_of(size: int, counts_S: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many of `size` each stratum of counts_S [S] pairs gives: its share, by largest remainders."""
    exact_S = size * counts_S / counts_S.sum()
    given_S = np.floor(exact_S).astype(np.int64)
    by_remainder = np.argsort(-(exact_S - given_S), kind="stable")
    given_S[by_remainder[: size - int(given_S.sum())]] += 1
    return np.asarray(given_S, dtype=np.int64)


def select_within(
    difficulty_P: NDArray[np.float64], pair_ids_P: NDArray[np.str_], rule: Rule, strata_P: NDArray[np.int64]
) -> Selection:
    """The easiest (or hardest) share within each stratum: as many of each as it has of all pairs.

    Ranks are by difficulty over all pairs.
    """
    rank_P = ranks(difficulty_P, pair_ids_P)
    given_S = shares_of(size_of(len(rank_P), rule), np.bincount(strata_P))
    way_P = rank_P if rule.name == "easiest" else -rank_P
    selected_P = np.zeros(len(rank_P), dtype=np.bool_)
    for stratum, given in enumerate(given_S):
        members = np.flatnonzero(strata_P == stratum)
        selected_P[members[np.argsort(way_P[members])[:given]]] = True
    named = f"the {rule.name} of its stratum"
    return Selection(rank_P, selected_P, np.where(selected_P, f"among {named}", f"not among {named}"))


def select_with_quota(
    difficulty_P: NDArray[np.float64],
    pair_ids_P: NDArray[np.str_],
    rule: Rule,
    source_P: NDArray[np.str_],
    quota: Mapping[str, float],
) -> Selection:
    """The easiest pairs, of which at least these shares are of these sources.

    First each source's easiest fill its quota, then the easiest of all others the rest.

    Raises:
        ConfigError: a source has fewer pairs than its quota.
    """
    rank_P = ranks(difficulty_P, pair_ids_P)
    size = size_of(len(rank_P), rule)
    way_P = rank_P if rule.name == "easiest" else -rank_P
    by_rank = np.argsort(way_P)
    selected_P = np.zeros(len(rank_P), dtype=np.bool_)
    for source, share in quota.items():
        least = int(np.ceil(round(share * size, 9)))
        members = by_rank[source_P[by_rank] == source]
        if len(members) < least:
            raise ConfigError(
                f"select.quota asks for {least:,} pairs of {source}, which has {len(members):,}: lower it, "
                "or select fewer pairs"
            )
        selected_P[members[:least]] = True
    reason_P = np.where(selected_P, "among its source's quota", "")
    rest = by_rank[~selected_P[by_rank]][: size - int(selected_P.sum())]
    selected_P[rest] = True
    named = f"the {rule.name} beside the quotas"
    reason_P = np.where(
        selected_P & (reason_P == ""), f"among {named}", np.where(selected_P, reason_P, f"not among {named}")
    )
    return Selection(rank_P, selected_P, reason_P)
