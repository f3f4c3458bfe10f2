"""What becomes of flagged pairs before a selection: dropped, turned round, sent to SFT, or weighing less."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from selective_dpo.config import FLAGS, Action, Flag
from selective_dpo.curriculum.records import LossTable
from selective_dpo.curriculum.table import ACTION, FLIPPED, P_WRONG, WEIGHT
from selective_dpo.errors import ConfigError
from selective_dpo.identity import positions_of
from selective_dpo.losses import PairLosses, is_dpos_own, negative_log_sigmoid

_PARTNERS = {"policy_chosen_logp": "policy_rejected_logp", "reference_chosen_logp": "reference_rejected_logp"}

_REASONS = {"drop": "dropped", "sft": "chosen answer to SFT"}


class Treatment(NamedTuple):
    """What `select.action` does to pairs; all [P], in the order of the losses."""

    losses: LossTable
    """With the losses, margins and log-probs that flipped pairs have under their new label."""
    action_P: NDArray[np.str_]
    """Empty where there is none."""
    flag_P: NDArray[np.str_]
    """The flag that it is for."""
    p_wrong_P: NDArray[np.float64]
    """Of the label that the pair is trained on with."""
    flags: Mapping[Flag, NDArray[np.bool_]]
    """All flags, of the label that the data have."""

    @property
    def stays_P(self) -> NDArray[np.bool_]:
        """The pairs that the rule chooses among."""
        return ~np.isin(self.action_P, list(_REASONS))

    @property
    def weight_P(self) -> NDArray[np.float64]:
        """In training: 1 - `p_wrong` of pairs to be weighted down, else 1."""
        return np.where(self.action_P == "down-weight", 1.0 - self.p_wrong_P, 1.0)

    @property
    def reason_P(self) -> list[str]:
        """Why a pair that does not stay is not selected."""
        return [
            f"{_REASONS[action]}: {flag.replace('_', ' ')}" if action in _REASONS else ""
            for action, flag in zip(self.action_P.tolist(), self.flag_P.tolist(), strict=True)
        ]

    @property
    def columns(self) -> dict[str, pa.Array]:
        """What they add to a curriculum's table."""
        return {
            P_WRONG: pa.array(self.p_wrong_P),
            **{flag: pa.array(which_P) for flag, which_P in self.flags.items()},
            ACTION: pa.array(self.action_P.tolist(), pa.string()),
            FLIPPED: pa.array(self.action_P == "flip"),
            WEIGHT: pa.array(self.weight_P),
        }


def treat(losses: LossTable, issues: pa.Table, actions: Mapping[Flag, Action]) -> Treatment:
    """Find the action for each pair, and turn round those that are to be flipped.

    A pair with several of the flags gets the action of the first of them in `actions`. The record of a pair
    under its other label is its own with chosen and rejected exchanged, since no scorer that measured the
    pair has seen its label.

    Args:
        losses: with margins.
        issues: the flags and `p_wrong` of the same pairs, in any order (see `curriculum.issues`).
        actions: of each flag that has one.

    Raises:
        IdentityError: a pair has no flags.
        ConfigError: pairs are to be flipped, and their losses are not DPO's own; or no pair is left.
    """
    at = pa.array(positions_of(losses.pair_ids_P.tolist(), issues["pair_id"].to_pylist(), what="flags"))
    ordered = issues.take(at)
    flags = {flag: np.asarray(ordered[flag], dtype=np.bool_) for flag in FLAGS}
    p_wrong_P = np.asarray(ordered[P_WRONG].to_numpy(), dtype=np.float64)
    flag_P = np.full(len(p_wrong_P), "", dtype="U32")
    for flag in reversed(list(actions)):  # the first one is written last
        flag_P[flags[flag]] = flag
    action_P = np.array([actions[flag] if flag else "" for flag in flag_P.tolist()], dtype="U16")
    flipped_P = action_P == "flip"
    turned = exchanged(losses, flipped_P) if flipped_P.any() else losses
    found = Treatment(turned, action_P, flag_P, np.where(flipped_P, 1.0 - p_wrong_P, p_wrong_P), flags)
    if not found.stays_P.any():
        raise ConfigError(
            "select.action leaves no pair to select: name fewer flags, or raise issues' thresholds"
        )
    return found


def exchanged(losses: LossTable, flipped_P: NDArray[np.bool_]) -> LossTable:
    """The losses with those of the pairs `flipped_P` [P] as under their other label.

    Raises:
        ConfigError: the losses are not DPO's own, or a criterion reads log-probs of one answer only.
    """
    margins_PSE = losses.others["margin"]
    known_PSE = np.isfinite(losses.losses_PSE)
    if not is_dpos_own(PairLosses(margins_PSE[known_PSE], losses.losses_PSE[known_PSE])):
        raise ConfigError(
            "select.action: a pair can be flipped only where difficulty is DPO's own loss (score.trainer."
            "loss_type sigmoid): drop it, send it to sft, or leave loss_type out"
        )
    others = {name: values_PSE.copy() for name, values_PSE in losses.others.items()}
    others["margin"][flipped_P] *= -1.0
    for chosen, rejected in _PARTNERS.items():
        if (chosen in others) != (rejected in others):
            raise ConfigError(
                f"select.action: flip needs {chosen} and {rejected}, and the criterion of select.aggregate "
                "reads one of them only: let it read both"
            )
        if chosen in others:
            one_PSE, other_PSE = losses.others[chosen], losses.others[rejected]
            others[chosen][flipped_P], others[rejected][flipped_P] = other_PSE[flipped_P], one_PSE[flipped_P]
    losses_PSE = losses.losses_PSE.copy()
    losses_PSE[flipped_P] = negative_log_sigmoid(others["margin"][flipped_P])
    return dataclasses.replace(losses, losses_PSE=losses_PSE, others=others)
