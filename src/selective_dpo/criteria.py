"""Difficulty criteria: from a pair's records to one number, by a registered function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from selective_dpo.errors import ConfigError
from selective_dpo.extensions import Registry, source_digest

Floats = NDArray[np.float64]

Score = Callable[..., Floats]
"""Record columns [P, S, E], by name -> difficulty [P], larger is harder."""

RECORD_COLUMNS = (
    "policy_chosen_logp",
    "policy_rejected_logp",
    "reference_chosen_logp",
    "reference_rejected_logp",
    "margin",
    "loss",
)
"""What a criterion may read, as `curriculum.records.Records` has it: log-probs are sums over the tokens."""


class Criterion(NamedTuple):
    """How a pair's records become its difficulty, and how that is called."""

    score: Score
    reads: tuple[str, ...]
    """The record columns that it reads: the names of its parameters."""
    label: str
    """In the label of a selection; empty for the default."""
    axis: str
    """The label of a figure's axis."""
    is_loss: bool
    """Whether a difficulty is as large as a loss, so that it can be compared with one."""


def _checked(name: str, score: Any, label: str, axis: str, is_loss: bool) -> Criterion:
    if not callable(score):
        raise ConfigError(f"criterion {name!r} is no function")
    reads = tuple(inspect.signature(score).parameters)
    unknown = [column for column in reads if column not in RECORD_COLUMNS]
    if unknown or not reads:
        raise ConfigError(
            f"criterion {name!r} reads {', '.join(unknown) or 'nothing'}: its parameters must be record "
            f"columns ({', '.join(RECORD_COLUMNS)})"
        )
    return Criterion(score, reads, label, axis, is_loss)


def _adopt(name: str, score: Any) -> Criterion:
    """The entry of a function named as `module:name`, which may be decorated there."""
    decorated = (entry for entry in CRITERIA.values() if entry.score is score)
    return next(decorated, None) or _checked(name, score, f"by {name}", name, is_loss=False)


CRITERIA: Registry[Criterion] = Registry("criterion", _adopt)
"""`select.aggregate` -> the criterion."""


def criterion(
    name: str, *, label: str | None = None, axis: str | None = None, is_loss: bool = False
) -> Callable[[Score], Score]:
    """Register the decorated function as `select.aggregate: NAME`; reports, figures and exports know it then.

    Its parameters name the record columns that it reads (see `RECORD_COLUMNS`): it gets each as an array
    [P, S, E] by pair, seed and evaluation, NaN where a pair lacks a record (only with `allow_partial`). It
    returns the difficulty [P], NaN for a pair that has none of the records that it reads.
    """

    def register(score: Score) -> Score:
        named, title = f"by {name}" if label is None else label, name if axis is None else axis
        CRITERIA[name] = _checked(name, score, named, title, is_loss)
        return score

    return register


def criterion_source(name: str) -> Mapping[str, str]:
    """For content keys: the digest of a user's criterion; empty for those of this package.

    Raises:
        ConfigError: there is no such criterion, or its source cannot be read.
    """
    score = CRITERIA[name].score
    return {} if score.__module__ == __name__ else {"criterion": source_digest(score)}


def by_record(loss: Floats) -> Floats:
    """The losses of each pair in one row, [P, S * E]."""
    # The width is spelled out: NumPy cannot infer it for a table without pairs.
    pairs, seeds, evaluations = loss.shape
    return loss.reshape(pairs, seeds * evaluations)


def _mean_of_present(values_PK: Floats) -> Floats:
    # nanmean is slower, and most tables have no gaps.
    has_gaps = np.isnan(values_PK).any()
    return np.asarray(np.nanmean(values_PK, axis=1) if has_gaps else values_PK.mean(axis=1))


@criterion("mean", label="", axis="mean held-out loss", is_loss=True)
def _mean(loss: Floats) -> Floats:
    """The mean of all of a pair's losses: the method."""
    return _mean_of_present(by_record(loss))


@criterion("final", label="by final loss", axis="held-out loss at the end of training", is_loss=True)
def _final(loss: Floats) -> Floats:
    """The mean over seeds of the last evaluation's losses."""
    return _mean_of_present(loss[:, :, -1])


@criterion("median", label="by median loss", axis="median held-out loss", is_loss=True)
def _median(loss: Floats) -> Floats:
    """The median of all of a pair's losses."""
    losses_PR = by_record(loss)
    has_gaps = np.isnan(losses_PR).any()
    return np.asarray(np.nanmedian(losses_PR, axis=1) if has_gaps else np.median(losses_PR, axis=1))


@criterion("rank-mean", label="by mean rank", axis="mean rank of the held-out loss, 1 is the hardest")
def _rank_mean(loss: Floats) -> Floats:
    """The mean over the S * E columns of the pair's mid-rank in the column, in (0, 1].

    Rank 1 is the lowest loss, ties share their mean rank, and ranks are divided by the column's pairs.
    """
    return _mean_of_present(np.stack([scaled_ranks(column_P) for column_P in by_record(loss).T], axis=1))


def scaled_ranks(values_P: Floats) -> Floats:
    """Mid-rank of each value divided by the number of values, in (0, 1]; NaN stays NaN and is not counted."""
    ranks_P = np.full(len(values_P), np.nan)
    present = np.isfinite(values_P)
    _, code_N, size_V = np.unique(values_P[present], return_inverse=True, return_counts=True)
    # The ranks of a tie run from `last - size + 1` to `last`; their mean is the mid-rank.
    last_V = np.cumsum(size_V)
    ranks_P[present] = (last_V - (size_V - 1) / 2)[code_N] / max(1, int(present.sum()))
    return ranks_P
