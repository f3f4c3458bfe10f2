"""From held-out records to a curriculum."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import ValidationError

from selective_dpo.config import DEFAULT_FRACTION, SelectConfig
from selective_dpo.config.messages import explain
from selective_dpo.criteria import CRITERIA, by_record
from selective_dpo.curriculum.actions import Treatment, treat
from selective_dpo.curriculum.agreement import agreement
from selective_dpo.curriculum.balance import (
    Attributes,
    needs_attributes,
    require_attributes,
    residual,
    select_with_quota,
    select_within,
    strata,
)
from selective_dpo.curriculum.records import Difficulty, LossTable, Records, difficulty, loss_table
from selective_dpo.curriculum.select import Rule, Selection, ranks, training_positions
from selective_dpo.curriculum.select import select as apply_rule
from selective_dpo.curriculum.table import COLUMNS, P_WRONG, Curriculum, loss_column
from selective_dpo.errors import ConfigError, RecordsError, name_some
from selective_dpo.logprobs.nonfinite import REASON
from selective_dpo.losses import LN_2, PairLosses, is_dpos_own
from selective_dpo.stats.calibration import probability_wrong

AttributesOf: TypeAlias = Callable[[Sequence[str]], Attributes]
"""Pair ids -> their attributes, in this order."""


def build_curriculum(
    records: Records | LossTable,
    select: SelectConfig | Mapping[str, Any] | None = None,
    *,
    provenance: Mapping[str, Any] | None = None,
    cost: Mapping[str, Any] | None = None,
    key: str = "",
    quarantined: Mapping[str, str] | None = None,
    chance_loss: float | None = None,
    issues: pa.Table | None = None,
    attributes: AttributesOf | None = None,
) -> Curriculum:
    """Aggregate records into difficulties, select and order the pairs, and measure the agreement.

    Args:
        records: held-out records, or their losses by (pair, seed, evaluation).
        select: the recipe's `select` block, or a mapping of its keys; default: the mean, easiest half,
            easy to hard.
        provenance: where the records come from; JSON values, kept as they are in the facts.
        cost: what they cost; likewise.
        key: content key of everything that the curriculum is made from.
        quarantined: pairs that were set aside as not finite (pair id -> prompt id); `records` hold none of
            them. They are listed, not selected, without a difficulty.
        chance_loss: the loss of a policy that has not moved (`losses.chance_loss` of the scorers'
            settings), above which pairs are counted; default: ln 2, that of DPO's own loss. Of records with
            another loss nothing is counted then.
        issues: the pairs' flags, which `action` of the selection needs (`curriculum.issues`). Agreement is
            then that of the pairs that the rule chooses among.
        attributes: lengths, sources and scores of pairs given by id, for `balance`, `residual` and `quota`.

    Returns:
        One row a pair, sorted by id. The facts hold the selection with its defaults filled in, as
        `pairs` the number of those that have a difficulty, as `quarantined` that of the others, and as
        `partial` the number of pairs with fewer records than the others.

    Raises:
        RecordsError: records are missing (unless `allow_partial`), repeated or not finite.
        ConfigError: the selection is not valid, or does not fit the pairs; or it has an `action` and there
            are no `issues`.
    """
    config = resolved_selection(select)
    losses = records
    is_dpo = True
    if isinstance(losses, Records):
        is_dpo = is_dpos_own(PairLosses(losses.margin, losses.loss))
        reads = {"margin", *CRITERIA[config.aggregate].reads}
        losses = loss_table(losses, allow_partial=config.allow_partial, columns=reads)
    if chance_loss is None and is_dpo:
        chance_loss = LN_2
    treatment = None
    if config.action:
        if issues is None:
            raise ConfigError(
                "select.action needs the pairs' flags: pass issues=find_issues(RUN).table, or let a run do it"
            )
        treatment = treat(losses, issues, config.action)
        losses = treatment.losses
    measured = difficulty(losses, config.aggregate, allow_partial=config.allow_partial)
    chosen_among = losses if treatment is None else losses.of_pairs(treatment.stays_P)
    facts = {
        "key": key,
        "agreement": agreement(chosen_among, config.aggregate, rule_of(config), chance_loss=chance_loss),
        "provenance": dict(provenance or {}),
        "cost": dict(cost or {}),
    }
    aside = quarantined or {}
    return assemble(
        losses,
        measured,
        config,
        facts,
        aside=aside,
        reason=REASON,
        attributes=attributes,
        treatment=treatment,
    )


def assemble(
    losses: LossTable,
    measured: Difficulty,
    config: SelectConfig,
    facts: Mapping[str, Any],
    *,
    aside: Mapping[str, str],
    reason: str,
    treatment: Treatment | None = None,
    attributes: AttributesOf | None = None,
) -> Curriculum:
    """Select from difficulties and order what was selected: the part that measured ones and others share.

    Args:
        losses: the pairs, and the losses that were measured of them, if any.
        measured: their difficulties.
        config: the selection, resolved.
        facts: what is not about the selection.
        aside: pairs without a difficulty (pair id -> prompt id), and `reason`, why they have none.
        attributes: lengths, sources and scores of pairs given by id, for `balance`, `residual` and `quota`.
        treatment: what `action` does to the pairs; `losses` are its.
    """
    measured, selected = _selected(losses.pair_ids_P, measured, config, attributes, treatment)
    position_P = training_positions(selected, losses.pair_ids_P, config.order, config.seed or 0)
    # Those of `COLUMNS`, without their suffix; what is not a number becomes null.
    given = {
        "pair_id_P": losses.pair_ids_P,
        "prompt_id_P": losses.prompt_ids_P,
        **measured._asdict(),
        **selected._asdict(),
        "position_P": position_P,
    }
    table = pa.table(
        {name: pa.array(given[f"{name}_P"], kind, from_pandas=True) for name, kind in COLUMNS.items()}
    )
    for (s, seed), (e, evaluation) in itertools.product(
        enumerate(losses.seeds_S), enumerate(losses.evaluations_E)
    ):
        losses_P = pa.array(losses.losses_PSE[:, s, e], from_pandas=True)
        table = table.append_column(loss_column(seed, evaluation), losses_P)
    if treatment is not None:
        for name, column in treatment.columns.items():
            table = table.append_column(name, column)
    elif "margin" in losses.others:
        margin_P = np.nanmean(by_record(losses.others["margin"]), axis=1)
        table = table.append_column(P_WRONG, pa.array(probability_wrong(margin_P)))
    own = {
        "pairs": len(losses.pair_ids_P),
        "selected": int(selected.selected_P.sum()),
        "select": config.identity(),
        "seeds": list(losses.seeds_S),
        "evaluations": list(losses.evaluations_E),
        "quarantined": len(aside) if reason == REASON else 0,
        "partial": int((measured.count_P < losses.complete).sum()),
    }
    return Curriculum(_with_aside(table, aside, reason), {**own, **facts})


def _selected(
    pair_ids_P: NDArray[np.str_],
    measured: Difficulty,
    config: SelectConfig,
    attributes: AttributesOf | None,
    treatment: Treatment | None,
) -> tuple[Difficulty, Selection]:
    """The difficulty that is selected by, and the selection: with a treatment, of the pairs that stay. Ranks
    are those among all pairs."""
    known = None
    if needs_attributes(config):
        known = _attributes(pair_ids_P, config, attributes, treatment)
        if config.residual:
            measured = measured._replace(difficulty_P=residual(measured.difficulty_P, known.length_P))
    if treatment is None:
        return measured, _by_rule(measured.difficulty_P, pair_ids_P, config, known)
    stays_P = treatment.stays_P
    of_stays = known
    if known is not None:
        of_stays = Attributes(known.length_P[stays_P], known.source_P[stays_P], known.score_P[stays_P])
    among = _by_rule(measured.difficulty_P[stays_P], pair_ids_P[stays_P], config, of_stays)
    selected_P = np.zeros(len(stays_P), dtype=np.bool_)
    selected_P[stays_P] = among.selected_P
    reason_P = np.array(treatment.reason_P, dtype=object)
    reason_P[stays_P] = among.reason_P
    rank_P = ranks(measured.difficulty_P, pair_ids_P)
    return measured, Selection(rank_P, selected_P, reason_P.astype(np.str_))


def _attributes(
    pair_ids_P: NDArray[np.str_],
    config: SelectConfig,
    attributes: AttributesOf | None,
    treatment: Treatment | None,
) -> Attributes:
    """Those of the labels that pairs are trained on with."""
    if attributes is None:
        raise ConfigError(
            "select.balance, residual and quota go by the pairs' lengths, sources and scores, which only a "
            "run has: give them in its recipe"
        )
    known = attributes(pair_ids_P.tolist())
    require_attributes(config, known)
    if treatment is None:
        return known
    sign_P = np.where(treatment.action_P == "flip", -1, 1)
    return known._replace(length_P=sign_P * known.length_P, score_P=sign_P * known.score_P)


def _by_rule(
    difficulty_P: NDArray[np.float64],
    pair_ids_P: NDArray[np.str_],
    config: SelectConfig,
    known: Attributes | None,
) -> Selection:
    rule = rule_of(config)
    if known is not None and config.balance:
        return select_within(difficulty_P, pair_ids_P, rule, strata(known, config.balance))
    if known is not None and config.quota:
        return select_with_quota(difficulty_P, pair_ids_P, rule, known.source_P, config.quota)
    return apply_rule(difficulty_P, pair_ids_P, rule)


def resolved_selection(select: SelectConfig | Mapping[str, Any] | None) -> SelectConfig:
    """The selection with the defaults that depend on its other keys filled in.

    Raises:
        ConfigError: `select` is a mapping with an unknown, wrong or contradictory key, or names a `source`.
    """
    try:
        config = select if isinstance(select, SelectConfig) else SelectConfig(**(select or {}))
    except ValidationError as error:
        raise ConfigError(f"select: {explain(error, SelectConfig)}") from None
    if config.source:
        raise ConfigError("select.from has no effect here: it is for evaluate.controls of a recipe")
    filled: dict[str, Any] = {}
    needs_size = config.rule in ("easiest", "hardest", "random")
    if needs_size and config.fraction is None and config.count is None:
        filled["fraction"] = DEFAULT_FRACTION
    if config.seed is None and (config.rule == "random" or config.order == "shuffled"):
        filled["seed"] = 0
    return config.model_copy(update=filled)


def rule_of(config: SelectConfig) -> Rule:
    """The selection's rule, as `select` takes it."""
    given = config.model_dump(include={"fraction", "count", "threshold", "band"})
    return Rule(config.rule, **given, seed=config.seed or 0)


def _with_aside(table: pa.Table, aside: Mapping[str, str], reason: str) -> pa.Table:
    """Append the pairs without numbers, and sort by id again."""
    if not aside:
        return table
    if both := sorted(set(aside) & set(table["pair_id"].to_pylist())):
        raise RecordsError(f"{len(both):,} pairs were set aside and have records: {name_some(both)}")
    known: dict[str, Any] = {"count": 0, "rank": -1, "selected": False, "reason": reason, "position": -1}
    rows = [{"pair_id": pair, "prompt_id": prompt, **known} for pair, prompt in aside.items()]
    together = pa.concat_tables([table, pa.Table.from_pylist(rows, schema=table.schema)])
    return together.sort_by("pair_id")
