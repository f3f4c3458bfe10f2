"""Held-out records as columns, and the one dense array that everything downstream computes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from selective_dpo.errors import RecordsError, name_some

LARGEST_LOSS = 1e30
"""In nats. A loss beyond it is no measurement; the sums and squares of those below stay finite."""


@dataclass(frozen=True)
class Records:
    """One row a held-out measurement; columns of equal length R.

    `evaluation` counts from 1; `fold` is the half that the pair is in, so its scorer was trained on
    the other half. Log-probs are sums over the completion's tokens, in nats; `margin` is beta times
    the difference of the chosen and rejected log-ratios; `loss` is the scorer's own training loss, for
    DPO's own -log sigmoid(margin), in nats (see `core.losses`).
    """

    pair_id: NDArray[np.str_]
    prompt_id: NDArray[np.str_]
    seed: NDArray[np.int64]
    fold: NDArray[np.int64]
    evaluation: NDArray[np.int64]
    step: NDArray[np.int64]
    policy_chosen_logp: NDArray[np.float64]
    policy_rejected_logp: NDArray[np.float64]
    reference_chosen_logp: NDArray[np.float64]
    reference_rejected_logp: NDArray[np.float64]
    margin: NDArray[np.float64]
    loss: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.pair_id)


@dataclass(frozen=True)
class LossTable:
    """Losses by pair, seed and evaluation: what difficulty, agreement and selection are computed from."""

    pair_ids_P: NDArray[np.str_]
    """Sorted, unique."""
    prompt_ids_P: NDArray[np.str_]
    seeds_S: tuple[int, ...]
    evaluations_E: tuple[int, ...]
    losses_PSE: NDArray[np.float64]
    """NaN where there is no record; complete tables have none."""

    @property
    def counts_P(self) -> NDArray[np.int64]:
        """Number of records of each pair."""
        pairs, seeds, evaluations = self.losses_PSE.shape
        held_PR = np.isfinite(self.losses_PSE).reshape(pairs, seeds * evaluations)
        return np.asarray(np.count_nonzero(held_PR, axis=1), dtype=np.int64)


class CodedRecords(NamedTuple):
    """Some records, their keys given as places along the axes of a table of losses; columns of length R."""

    pair_R: NDArray[np.integer[Any]]
    seed_R: NDArray[np.integer[Any]]
    evaluation_R: NDArray[np.integer[Any]]
    fold_R: NDArray[np.integer[Any]]
    """The folds themselves: they are no axis."""
    loss_R: NDArray[np.float64]


class Axes(NamedTuple):
    """What the places along a table of losses stand for."""

    pair_ids_P: NDArray[np.str_]
    """Sorted, unique."""
    prompt_ids_P: NDArray[np.str_]
    seeds_S: tuple[int, ...]
    evaluations_E: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(P, S, E)."""
        return len(self.pair_ids_P), len(self.seeds_S), len(self.evaluations_E)


def loss_table(records: Records, *, allow_partial: bool = False) -> LossTable:
    """Arrange records by (pair, seed, evaluation), each exactly once.

    Raises:
        RecordsError: no records; a record stands twice; a loss is not finite; a pair was measured in both
            folds of a seed; or, unless `allow_partial`, a pair lacks a record. Some of the pairs are named.
    """
    pair_ids, first, pair_R = np.unique(records.pair_id, return_index=True, return_inverse=True)
    seeds, seed_R = np.unique(records.seed, return_inverse=True)
    evaluations, evaluation_R = np.unique(records.evaluation, return_inverse=True)
    axes = Axes(pair_ids, records.prompt_id[first], tuple(seeds.tolist()), tuple(evaluations.tolist()))
    part = CodedRecords(pair_R, seed_R, evaluation_R, records.fold, records.loss)
    return arrange(axes, [part], allow_partial=allow_partial)


def arrange(axes: Axes, parts: Sequence[CodedRecords], *, allow_partial: bool = False) -> LossTable:
    """The table of the records in `parts`; `loss_table` says what is refused."""
    if not any(len(part.loss_R) for part in parts):
        raise RecordsError("there are no records: run the scoring first")
    _require_finite(axes, parts)
    losses_PSE = np.full(axes.shape, np.nan)
    records_P = np.zeros(len(axes.pair_ids_P), dtype=np.int64)
    for part in parts:
        cell_R = np.ravel_multi_index((part.pair_R, part.seed_R, part.evaluation_R), axes.shape)
        losses_PSE.reshape(-1)[cell_R] = part.loss_R
        records_P += np.bincount(part.pair_R, minlength=len(records_P))
    table = LossTable(*axes, losses_PSE)
    # All losses are finite, so a pair with more records than filled cells has two in one of them.
    counts_P = table.counts_P
    if (records_P > counts_P).any():
        repeated = axes.pair_ids_P[records_P > counts_P]
        raise RecordsError(
            f"{len(repeated):,} pairs have two records for one seed and evaluation: {name_some(repeated)}"
        )
    _require_one_fold(axes, parts)
    complete = len(axes.seeds_S) * len(axes.evaluations_E)
    if (counts_P < complete).any() and not allow_partial:
        lacking = axes.pair_ids_P[counts_P < complete]
        raise RecordsError(
            f"{len(lacking):,} of {len(counts_P):,} pairs lack some of their {complete} records: "
            f"{name_some(lacking)}; score them, or accept them with --allow-partial"
        )
    return table


def _require_finite(axes: Axes, parts: Sequence[CodedRecords]) -> None:
    # Written so that NaN, which compares with nothing, is refused as well.
    bad = np.concatenate([part.pair_R[~(np.abs(part.loss_R) <= LARGEST_LOSS)] for part in parts])
    if len(bad):
        named = axes.pair_ids_P[np.unique(bad)]
        raise RecordsError(f"{len(named):,} pairs have a loss that is not finite: {name_some(named)}")


def _require_one_fold(axes: Axes, parts: Sequence[CodedRecords]) -> None:
    """A seed's two scorers were trained on one fold each: the scorer of the other fold knows the pair."""
    fold_PS = np.zeros(axes.shape[:2], dtype=np.int64)
    for part in parts:
        fold_PS[part.pair_R, part.seed_R] = part.fold_R
    # The last record of a pair and seed stands there now: an earlier one of the other fold differs from it.
    differs = [part.pair_R[fold_PS[part.pair_R, part.seed_R] != part.fold_R] for part in parts]
    two_folds = np.concatenate(differs)
    if len(two_folds):
        named = axes.pair_ids_P[np.unique(two_folds)]
        raise RecordsError(
            f"{len(named):,} pairs have records of both folds of one seed: {name_some(named)}; "
            "one of its two scorers was trained on them, so score that seed again"
        )
