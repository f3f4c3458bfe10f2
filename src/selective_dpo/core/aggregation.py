"""From a pair's records to its difficulty."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from selective_dpo.core.records import LossTable
from selective_dpo.errors import RecordsError, name_some

Aggregate = Literal["mean", "final", "median", "rank-mean"]


class Difficulty(NamedTuple):
    """One number a pair, and what it was made from."""

    difficulty_P: NDArray[np.float64]
    """Larger is harder. Nats, but for `rank-mean`, whose values lie in (0, 1]."""
    spread_P: NDArray[np.float64]
    """Standard deviation of the pair's own losses (divisor n: 0 for a single record), in nats."""
    count_P: NDArray[np.int64]
    """Number of the pair's records."""


def difficulty(table: LossTable, how: Aggregate = "mean", *, allow_partial: bool = False) -> Difficulty:
    """Reduce losses_PSE [P, S, E] to one difficulty for each pair.

    `mean` and `median` take all of a pair's losses; `final` the mean over seeds of the last
    evaluation's; `rank-mean` the mean over the S * E columns of the pair's mid-rank in the column
    (1 for the lowest loss, ties share their mean rank) divided by the column's number of pairs.

    With `allow_partial` each is taken over the records that a pair has.

    Raises:
        RecordsError: a loss is infinite; a pair lacks records and `allow_partial` is off; or a pair
            has none of the records that `how` reads. Some of the pairs are named.
    """
    losses_PSE = table.losses_PSE
    if np.isinf(losses_PSE).any():
        bad = table.pair_ids_P[np.isinf(losses_PSE).any(axis=(1, 2))]
        raise RecordsError(f"{len(bad):,} pairs have an infinite loss: {name_some(bad)}")
    count_P = table.counts_P
    complete = losses_PSE.shape[1] * losses_PSE.shape[2]
    lacking = table.pair_ids_P[count_P < complete]
    if len(lacking) and not allow_partial:
        raise RecordsError(
            f"{len(lacking):,} of {len(count_P):,} pairs lack some of their {complete} records: "
            f"{name_some(lacking)}; score them, or accept them with --allow-partial"
        )
    read_PK = _values_read(losses_PSE, how)
    empty = table.pair_ids_P[~np.isfinite(read_PK).any(axis=1)]
    if len(empty):
        raise RecordsError(f"{len(empty):,} pairs have no record that '{how}' reads: {name_some(empty)}")
    losses_PR = _by_record(losses_PSE)
    # The NaN-skipping forms are reached only with `allow_partial`: on a complete table a NaN that
    # slipped in must show, not be averaged away.
    if how == "median":
        difficulty_P = np.nanmedian(read_PK, axis=1) if len(lacking) else np.median(read_PK, axis=1)
    else:
        difficulty_P = np.nanmean(read_PK, axis=1) if len(lacking) else read_PK.mean(axis=1)
    spread_P = np.nanstd(losses_PR, axis=1) if len(lacking) else losses_PR.std(axis=1)
    return Difficulty(difficulty_P, spread_P, count_P)


def _values_read(losses_PSE: NDArray[np.float64], how: Aggregate) -> NDArray[np.float64]:
    """The values [P, K] whose mean (or median) over K is the difficulty."""
    if how == "final":
        return losses_PSE[:, :, -1]
    losses_PR = _by_record(losses_PSE)
    if how == "rank-mean":
        return np.stack([scaled_ranks(column_P) for column_P in losses_PR.T], axis=1)
    if how in ("mean", "median"):
        return losses_PR
    raise ValueError(f"unknown aggregate {how!r}")


def _by_record(losses_PSE: NDArray[np.float64]) -> NDArray[np.float64]:
    # The width is spelled out: NumPy cannot tell it of a table without pairs.
    pairs, seeds, evaluations = losses_PSE.shape
    return losses_PSE.reshape(pairs, seeds * evaluations)


def scaled_ranks(values_P: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mid-rank of each value divided by the number of values, in (0, 1]; NaN stays NaN and is not counted."""
    ranks_P = np.full(len(values_P), np.nan)
    held = np.isfinite(values_P)
    _, code_N, size_V = np.unique(values_P[held], return_inverse=True, return_counts=True)
    # The ranks of a tie run from `last - size + 1` to `last`; their mean is the mid-rank.
    last_V = np.cumsum(size_V)
    ranks_P[held] = (last_V - (size_V - 1) / 2)[code_N] / max(1, int(held.sum()))
    return ranks_P
