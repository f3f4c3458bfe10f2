"""From a pair's records to its difficulty, by one of the registered criteria."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Score = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Losses [P, S, E], NaN where there is no record -> difficulty [P], larger is harder."""


class Criterion(NamedTuple):
    """How a pair's records become its difficulty, and how that is called."""

    score: Score
    words: str
    """In the label of a selection; empty: it goes without saying."""
    axis: str
    """At the axis of a figure."""
    is_loss: bool
    """Whether a difficulty is as large as a loss, so that it can be compared with one."""


CRITERIA: dict[str, Criterion] = {}
"""`select.aggregate` -> the criterion."""


def criterion(
    name: str, *, words: str | None = None, axis: str | None = None, is_loss: bool = False
) -> Callable[[Score], Score]:
    """Register the decorated function as `select.aggregate: NAME`; reports, figures and exports know it then.

    It gets losses_PSE [P, S, E], NaN where a pair lacks a record (only with `allow_partial`), and returns
    the difficulty [P], NaN for a pair that has none of the records that it reads.
    """

    def register(score: Score) -> Score:
        CRITERIA[name] = Criterion(
            score, f"by {name}" if words is None else words, name if axis is None else axis, is_loss
        )
        return score

    return register


def by_record(losses_PSE: NDArray[np.float64]) -> NDArray[np.float64]:
    """The losses of each pair in one row, [P, S * E]."""
    # The width is spelled out: NumPy cannot tell it of a table without pairs.
    pairs, seeds, evaluations = losses_PSE.shape
    return losses_PSE.reshape(pairs, seeds * evaluations)


def _mean_of_those_held(values_PK: NDArray[np.float64]) -> NDArray[np.float64]:
    # The form that skips is slower, and most tables have no gaps.
    has_gaps = np.isnan(values_PK).any()
    return np.asarray(np.nanmean(values_PK, axis=1) if has_gaps else values_PK.mean(axis=1))


@criterion("mean", words="", axis="mean held-out loss", is_loss=True)
def _mean(losses_PSE: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of all of a pair's losses: the method."""
    return _mean_of_those_held(by_record(losses_PSE))


@criterion("final", words="by final loss", axis="held-out loss at the end of training", is_loss=True)
def _final(losses_PSE: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over seeds of the last evaluation's losses."""
    return _mean_of_those_held(losses_PSE[:, :, -1])


@criterion("median", words="by median loss", axis="median held-out loss", is_loss=True)
def _median(losses_PSE: NDArray[np.float64]) -> NDArray[np.float64]:
    """The median of all of a pair's losses."""
    losses_PR = by_record(losses_PSE)
    has_gaps = np.isnan(losses_PR).any()
    return np.asarray(np.nanmedian(losses_PR, axis=1) if has_gaps else np.median(losses_PR, axis=1))


@criterion("rank-mean", words="by mean rank", axis="mean rank of the held-out loss, 1 is the hardest")
def _rank_mean(losses_PSE: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over the S * E columns of the pair's mid-rank in the column, in (0, 1].

    Rank 1 is the lowest loss, ties share their mean rank, and ranks are divided by the column's pairs.
    """
    return _mean_of_those_held(
        np.stack([scaled_ranks(column_P) for column_P in by_record(losses_PSE).T], axis=1)
    )


def scaled_ranks(values_P: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mid-rank of each value divided by the number of values, in (0, 1]; NaN stays NaN and is not counted."""
    ranks_P = np.full(len(values_P), np.nan)
    held = np.isfinite(values_P)
    _, code_N, size_V = np.unique(values_P[held], return_inverse=True, return_counts=True)
    # The ranks of a tie run from `last - size + 1` to `last`; their mean is the mid-rank.
    last_V = np.cumsum(size_V)
    ranks_P[held] = (last_V - (size_V - 1) / 2)[code_N] / max(1, int(held.sum()))
    return ranks_P
