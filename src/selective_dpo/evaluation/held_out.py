"""How a policy does on preference pairs that nothing was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from selective_dpo.core.dpo import dpo_losses
from selective_dpo.core.identity import positions_of
from selective_dpo.core.preference_metrics import PreferenceMetrics, preference_metrics
from selective_dpo.errors import DataError, IdentityError, RecordsError, name_some

if TYPE_CHECKING:
    from selective_dpo.engine.logprobs import PairLogps


def held_out_metrics(
    policy: PairLogps, reference: PairLogps, prompt_ids: Mapping[str, str], *, beta: float
) -> PreferenceMetrics:
    """DPO loss, accuracy and margin of `policy` on its pairs, each clustered by prompt.

    `reference` and `prompt_ids` (pair_id -> prompt_id) may hold further pairs, in any order. `beta` is the
    policy's own: margins of policies with different betas are not comparable.

    Raises:
        DataError: no pairs.
        IdentityError: a pair has no reference log-probs or no prompt id, or stands twice.
        RecordsError: a loss is not finite; some of the pairs are named.
    """
    if not policy.pair_ids:
        raise DataError("no held-out pairs are left to evaluate; look at the drop reasons of data.test")
    place_P = positions_of(policy.pair_ids, reference.pair_ids, what="held-out reference log-probs")
    missing = [pair_id for pair_id in policy.pair_ids if pair_id not in prompt_ids]
    if missing:
        raise IdentityError(f"{len(missing):,} held-out pairs have no prompt id: {name_some(missing)}")
    losses = dpo_losses(
        policy.chosen_P,
        policy.rejected_P,
        reference.chosen_P[place_P],
        reference.rejected_P[place_P],
        beta=beta,
    )
    finite_P = np.isfinite(losses.loss_P)
    if not finite_P.all():
        bad = [policy.pair_ids[row] for row in np.flatnonzero(~finite_P)]
        raise RecordsError(f"{len(bad):,} held-out pairs have a loss that is not finite: {name_some(bad)}")
    return preference_metrics(
        losses.loss_P, losses.margin_P, [prompt_ids[pair_id] for pair_id in policy.pair_ids]
    )
