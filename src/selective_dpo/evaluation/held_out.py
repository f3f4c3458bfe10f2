"""How a policy does on preference pairs that nothing was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from selective_dpo.core.identity import positions_of
from selective_dpo.core.losses import is_pairwise, pair_losses
from selective_dpo.core.preference_metrics import PreferenceMetrics, preference_metrics
from selective_dpo.errors import DataError, IdentityError, RecordsError, name_some

if TYPE_CHECKING:
    from selective_dpo.engine.logprobs import PairLogps


def held_out_metrics(
    policy: PairLogps,
    reference: PairLogps,
    tokens_P2: ArrayLike,
    prompt_ids: Mapping[str, str],
    settings: Mapping[str, Any],
) -> PreferenceMetrics:
    """Loss, accuracy and margin of `policy` on its pairs, each clustered by prompt.

    `reference` and `prompt_ids` (pair_id -> prompt_id) may hold further pairs, in any order; `tokens_P2` are
    the completions' numbers of tokens, in the policy's order. `settings` are those that the policy was
    trained with: the loss is the trained one, and DPO's own at that beta where the trained one is not
    pairwise (see `core.losses`). Margins of policies with different betas are not comparable.

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
    if not is_pairwise(settings):
        settings = {"beta": settings["beta"]}
    policy_P2 = np.stack([policy.chosen_P, policy.rejected_P], axis=1)
    reference_P2 = np.stack([reference.chosen_P, reference.rejected_P], axis=1)[place_P]
    losses = pair_losses(policy_P2, reference_P2, tokens_P2, settings)
    finite_P = np.isfinite(losses.loss_P)
    if not finite_P.all():
        bad = [policy.pair_ids[row] for row in np.flatnonzero(~finite_P)]
        raise RecordsError(f"{len(bad):,} held-out pairs have a loss that is not finite: {name_some(bad)}")
    return preference_metrics(
        losses.loss_P, losses.margin_P, [prompt_ids[pair_id] for pair_id in policy.pair_ids]
    )
