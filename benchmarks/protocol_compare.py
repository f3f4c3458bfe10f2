"""Whether both sides measured the same, and what a cheaper protocol keeps of the full one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from protocol_trl import HeldOut
from selective_dpo.curriculum.agreement import agreement
from selective_dpo.curriculum.records import LossTable, Records
from selective_dpo.curriculum.select import Rule
from selective_dpo.identity import positions_of
from selective_dpo.logprobs.compute import PairLogps

COMPARED = ("spearman", "overlap")


class Difference(NamedTuple):
    """How far our losses are from theirs."""

    max_abs_diff: float
    """Nats; also against the mean that TRL itself reports of an evaluation."""
    losses: int
    """How many both sides measured: of the same pair, seed and number of updates."""


def compare(ours: Records, theirs: Sequence[HeldOut]) -> Difference:
    """Our losses and theirs, joined by pair, seed and updates.

    Raises:
        SystemExit: there is nothing to compare.
    """
    at = {
        (pair, each.seed, each.step): loss
        for each in theirs
        for pair, loss in zip(each.pair_ids, each.loss_P.tolist(), strict=True)
    }
    keys = zip(ours.pair_id.tolist(), ours.seed.tolist(), ours.step.tolist(), strict=True)
    differences = [
        abs(loss - at[key]) for key, loss in zip(keys, ours.loss.tolist(), strict=True) if key in at
    ]
    if not differences:
        raise SystemExit("no loss was measured by both sides")
    kept_wrongly = max(abs(float(each.loss_P.mean()) - each.mean_loss) for each in theirs)
    return Difference(max(*differences, kept_wrongly), len(differences))


def compare_reference(one: PairLogps, other: PairLogps) -> Difference:
    """Two tables of the reference's log-probs, joined by pair: where no loss is measured by both sides."""
    at = positions_of(one.pair_ids, other.pair_ids, what="reference log-probs")
    differences = [one.chosen_P - other.chosen_P[at], one.rejected_P - other.rejected_P[at]]
    return Difference(float(np.abs(differences).max()), 2 * len(one.pair_ids))


def agreement_with(paper: LossTable, other: LossTable) -> dict[str, Any]:
    """Spearman correlation of the difficulties, and overlap of the easiest halves, of two protocols.

    Intervals are of level 95%, clustered by prompt. Seeds that both have are compared with themselves, as
    in practice they would be; `other seeds` compares with the records of the others.
    """
    own = [seed in other.seeds_S for seed in paper.seeds_S]
    compared = {"paper": _between(paper, other)}
    if not all(own):
        kept_S = [not is_own for is_own in own]
        seeds = tuple(seed for seed, kept in zip(paper.seeds_S, kept_S, strict=True) if kept)
        rest = replace(paper, seeds_S=seeds, losses_PSE=paper.losses_PSE[:, kept_S])
        compared["other seeds"] = _between(rest, other)
    return compared


def learned(table: LossTable) -> dict[str, float]:
    """Mean held-out loss at the last evaluation, and the share of pairs on whose label the scorers agree."""
    last_P = table.losses_PSE[:, :, -1].mean(axis=1)
    return {"held_out_loss": float(last_P.mean()), "held_out_accuracy": float((last_P < np.log(2)).mean())}


def _between(one: LossTable, other: LossTable) -> dict[str, Any]:
    if one.pair_ids_P.tolist() != other.pair_ids_P.tolist():
        raise SystemExit("two protocols measured different pairs")
    both_PSE = np.stack([table.losses_PSE.mean(axis=(1, 2)) for table in (one, other)], axis=1)[:, :, None]
    two = replace(one, seeds_S=(0, 1), evaluations_E=(1,), losses_PSE=both_PSE)
    (between,) = agreement(two, rule=Rule(fraction=0.5))["seeds"]
    return {name: between[name] for name in COMPARED}
