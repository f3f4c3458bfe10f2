"""Held-out records as columns, and the one dense array that everything downstream computes on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selective_dpo.errors import RecordsError, name_some


@dataclass(frozen=True)
class Records:
    """One row a held-out measurement; columns of equal length R.

    `evaluation` counts from 1; `fold` is the half that the pair is in, so its scorer was trained on
    the other half. Log-probs are sums over the completion's tokens, in nats; `margin` is beta times
    the difference of the chosen and rejected log-ratios; `loss` is -log sigmoid(margin), in nats.
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
        return np.asarray(np.isfinite(self.losses_PSE).sum(axis=(1, 2)), dtype=np.int64)


def loss_table(records: Records, *, allow_partial: bool = False) -> LossTable:
    """Arrange records by (pair, seed, evaluation), each exactly once.

    Raises:
        RecordsError: no records; a record stands twice; a loss is not finite; or, unless
            `allow_partial`, a pair lacks one. Some of the pairs are named.
    """
    if not len(records):
        raise RecordsError("there are no records: run the scoring first")
    finite = np.isfinite(records.loss)
    if not finite.all():
        bad = np.unique(records.pair_id[~finite])
        raise RecordsError(f"{len(bad):,} pairs have a loss that is not finite: {name_some(bad)}")
    pair_ids, first, pair_R = np.unique(records.pair_id, return_index=True, return_inverse=True)
    seeds, seed_R = np.unique(records.seed, return_inverse=True)
    evaluations, evaluation_R = np.unique(records.evaluation, return_inverse=True)
    shape = (len(pair_ids), len(seeds), len(evaluations))
    cell_R = np.ravel_multi_index((pair_R, seed_R, evaluation_R), shape)
    held_PSE = np.bincount(cell_R, minlength=int(np.prod(shape))).reshape(shape)
    if held_PSE.max() > 1:
        repeated = pair_ids[(held_PSE > 1).any(axis=(1, 2))]
        raise RecordsError(
            f"{len(repeated):,} pairs have two records for one seed and evaluation: {name_some(repeated)}"
        )
    missing_P = (held_PSE == 0).any(axis=(1, 2))
    if missing_P.any() and not allow_partial:
        raise RecordsError(
            f"{int(missing_P.sum()):,} of {len(pair_ids):,} pairs lack some of their "
            f"{shape[1] * shape[2]} records: {name_some(pair_ids[missing_P])}; score them, "
            "or accept them with --allow-partial"
        )
    losses = np.full(shape, np.nan)
    losses.reshape(-1)[cell_R] = records.loss
    return LossTable(
        pair_ids,
        records.prompt_id[first],
        tuple(int(seed) for seed in seeds),
        tuple(int(evaluation) for evaluation in evaluations),
        losses,
    )
