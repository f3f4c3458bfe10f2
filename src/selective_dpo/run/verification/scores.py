"""Records: each scorer measured the pairs that it held out, at every evaluation; and rightly."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from selective_dpo.config import Recipe
from selective_dpo.curriculum.records import Records, read_records
from selective_dpo.difficulty.held_out import evaluation_steps
from selective_dpo.difficulty.protocols import ScorerRun, split_pairs
from selective_dpo.difficulty.scorer import COST, RECORDS
from selective_dpo.errors import name_some
from selective_dpo.logprobs.compute import PairLogps
from selective_dpo.logprobs.nonfinite import FILE as QUARANTINE
from selective_dpo.logprobs.nonfinite import read_quarantine
from selective_dpo.losses import loss_names, pair_losses
from selective_dpo.run.folder import RunDirectory
from selective_dpo.run.verification.check import DAMAGE, Check, Checks
from selective_dpo.run.verification.files import artifact_name
from selective_dpo.run.verification.pairs import Kept
from selective_dpo.storage.artifacts import read_json
from selective_dpo.training.arguments import ORIGINAL_DEFAULTS

TOLERANCE = 1e-6
"""Largest difference, in nats, between a loss and the one computed again from its log-probs in float64."""


class Inputs(NamedTuple):
    """What records are compared with; None where it could not be read."""

    recipe: Recipe | None
    kept: Kept | None
    reference: PairLogps | None


class Halves(NamedTuple):
    """The pairs and prompts that the scorers of one seed measured, by fold."""

    pairs: dict[int, set[str]]
    prompts: dict[int, set[str]]
    aside: set[str]
    """Pairs that were set aside as not finite: nothing is measured of them."""


def check_scores(
    checks: Checks, folder: RunDirectory, scorers: tuple[ScorerRun, ...], inputs: Inputs
) -> None:
    """The records of all `scorers`, then what those of a seed hold together."""
    seeds: dict[int, Halves] = {}
    not_in_reference = _aside(folder.reference)
    missing = [scorer.name for scorer in scorers if not (folder.scores(scorer) / RECORDS).is_file()]
    for scorer in scorers:
        if scorer.name not in missing:
            with checks.of(artifact_name(folder.root, folder.scores(scorer))) as check:
                records = read_records(folder.scores(scorer) / RECORDS)
                halves = seeds.setdefault(scorer.seed, Halves({}, {}, set(not_in_reference)))
                halves.pairs[scorer.fold] = set(records.pair_id.tolist())
                halves.prompts[scorer.fold] = set(records.prompt_id.tolist())
                halves.aside.update(read_quarantine([folder.scores(scorer)]))
                _check_scorer(check, folder, scorer, records, inputs)
    with checks.of("folds", "scores") as check:
        if not seeds:
            check.absent()
        else:
            check.counted = f"{sum(len(each.pairs) for each in seeds.values())} of {len(scorers)} scorers"
            check.counted += f"; absent: {name_some(missing)}" if missing else ""
        for seed, halves in seeds.items():
            _check_halves(check, f"scores/seed{seed}", halves, inputs.kept)


def _check_scorer(
    check: Check, folder: RunDirectory, scorer: ScorerRun, records: Records, inputs: Inputs
) -> None:
    name = f"scores/{scorer.name}/{RECORDS}"
    evaluations = sorted(set(records.evaluation.tolist()))
    check.counted = f"{len(records):,} records: {len(evaluations)} evaluations"
    for column, wanted in (("seed", scorer.seed), ("fold", scorer.fold)):
        found = sorted(set(getattr(records, column).tolist()) - {wanted})
        check.require(
            not found, name, f"records of {column} {name_some(found)} stand among those of {wanted}"
        )
    if inputs.recipe is not None:
        check.equal(name, "evaluations", evaluations, list(range(1, inputs.recipe.score.evaluations + 1)))
    aside, not_in_reference = _aside(folder.scores(scorer)), _aside(folder.reference)
    check.counted += f", {len(aside):,} pairs set aside as not finite" if aside else ""
    held_out = _held_out(scorer, inputs.kept)
    if held_out is not None:
        strangers = sorted(aside - set(held_out))
        problem = f"{len(strangers):,} ids are not those of the held-out half: {name_some(strangers)}"
        check.require(not strangers, f"scores/{scorer.name}/{QUARANTINE}", problem)
        held_out = [pair_id for pair_id in held_out if pair_id not in aside | not_in_reference]
    for evaluation in evaluations:
        ids = records.pair_id[records.evaluation == evaluation].tolist()
        wanted_ids = held_out if held_out is not None else records.pair_id.tolist()
        of = "the held-out half" if held_out is not None else "the other evaluations"
        check.same_ids(f"{name}, evaluation {evaluation}", ids, wanted_ids, of)
    if inputs.kept is not None:
        prompt_of = inputs.kept.prompt_of
        given = zip(records.pair_id.tolist(), records.prompt_id.tolist(), strict=True)
        is_other = np.array([prompt_of.get(pair, prompt) != prompt for pair, prompt in given], dtype=bool)
        check.at_no_row(name, records.pair_id, is_other, "prompt_id is not that of the pairs")
    _check_steps(check, name, folder.scores(scorer), records, evaluations, len(aside))
    _check_losses(check, name, records, inputs)


def _aside(folder: Path) -> set[str]:
    """The pairs that were set aside in a folder. A damaged file is named where its digest is checked."""
    try:
        return set(read_quarantine([folder]))
    except DAMAGE:
        return set()


def _held_out(scorer: ScorerRun, kept: Kept | None) -> list[str] | None:
    if kept is None:
        return None
    rows = split_pairs(kept.prompt_ids, scorer).held_out
    return [kept.pair_ids[row] for row in rows]


def _check_steps(
    check: Check, name: str, folder: Path, records: Records, evaluations: list[int], aside: int
) -> None:
    cost = read_json(folder / COST)
    found = {
        evaluation: sorted(set(records.step[records.evaluation == evaluation].tolist()))
        for evaluation in evaluations
    }
    planned = evaluation_steps(int(cost["optimizer_steps"]), len(evaluations))
    wanted = {evaluation: [step] for evaluation, step in zip(evaluations, planned, strict=True)}
    check.equal(name, "steps by evaluation", found, wanted)
    pairs = len(set(records.pair_id.tolist())) + aside
    check.equal(f"scores/{folder.name}/{COST}", "held_out_pairs", cost["held_out_pairs"], pairs)


def _check_losses(check: Check, name: str, records: Records, inputs: Inputs) -> None:
    ids = records.pair_id
    is_finite = np.isfinite(records.loss) & np.isfinite(records.margin)
    check.at_no_row(name, ids, ~is_finite, "loss or margin is not finite")
    if inputs.reference is not None:
        _check_reference(check, name, records, inputs.reference)
    if inputs.recipe is None:
        return
    settings = {**ORIGINAL_DEFAULTS, **inputs.recipe.score.trainer}
    policy_R2, reference_R2 = (
        np.stack([getattr(records, f"{of}_{side}_logp") for side in ("chosen", "rejected")], axis=1)
        for of in ("policy", "reference")
    )
    tokens_R2 = _completion_tokens(ids, inputs.kept)
    again = pair_losses(policy_R2, reference_R2, tokens_R2, settings)
    # Where a pair's tokens are not known, a loss that reads them cannot be computed again.
    is_known = np.isfinite(tokens_R2).all(axis=1)
    for column, values_R in (("margin", again.margin_P), ("loss", again.loss_P)):
        differs = ~(np.abs(getattr(records, column) - values_R) <= TOLERANCE)
        differs &= is_known | np.isfinite(values_R)
        of = f"{'+'.join(loss_names(settings))}, beta {settings['beta']:g}"
        check.at_no_row(name, ids, differs, f"{column} is not that of the log-probs ({of})")


def _completion_tokens(ids_R: NDArray[np.str_], kept: Kept | None) -> NDArray[np.float64]:
    """Tokens of each record's completions [R, 2]; NaN where the pair is not known."""
    known = {} if kept is None else dict(zip(kept.pair_ids, kept.tokens_P2.tolist(), strict=True))
    tokens = [known.get(pair_id, (np.nan, np.nan)) for pair_id in ids_R.tolist()]
    return np.array(tokens, dtype=np.float64).reshape(-1, 2)


def _check_reference(check: Check, name: str, records: Records, reference: PairLogps) -> None:
    place = {pair_id: row for row, pair_id in enumerate(reference.pair_ids)}
    at_R: NDArray[np.int64] = np.array(
        [place.get(pair_id, -1) for pair_id in records.pair_id.tolist()], dtype=np.int64
    )
    known = at_R >= 0
    for column, values_P in (("chosen", reference.chosen_P), ("rejected", reference.rejected_P)):
        differs = known & (getattr(records, f"reference_{column}_logp") != values_P[at_R])
        check.at_no_row(name, records.pair_id, differs, f"reference_{column}_logp is not that of reference")


def _check_halves(check: Check, name: str, halves: Halves, kept: Kept | None) -> None:
    if len(halves.pairs) < 2:
        return
    for what, sets in (("pairs", halves.pairs), ("prompts", halves.prompts)):
        both = sorted(sets[0] & sets[1])
        check.require(not both, name, f"{len(both):,} {what} are in both folds: {name_some(both)}")
    if kept is not None:
        ids = sorted(halves.pairs[0] | halves.pairs[1] | halves.aside)
        check.same_ids(name, ids, kept.pair_ids, "the kept pairs")
