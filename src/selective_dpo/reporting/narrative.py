"""The measured numbers in words. A sentence is only as strong as its interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from selective_dpo.core.estimates import Estimate
from selective_dpo.core.losses import LN_2
from selective_dpo.core.results import (
    REFERENCE,
    SELECTED,
    ArmResult,
    EvaluationResults,
    estimate_from_json,
    main_measure,
)
from selective_dpo.reporting.content import ReportContent
from selective_dpo.reporting.tables import chance_in_words, label_for

_JUDGES = {
    "embedded-world": "the world's own gold reward",
    "reward-model": "a reward model",
}
_AGAINST_HALF = {1: "it is better", -1: "it is worse", 0: "this run does not tell the two apart"}


class Tile(NamedTuple):
    """One number that stands large at the top of the page."""

    name: str
    value: str
    note: str


def tiles(content: ReportContent) -> list[Tile]:
    """Up to four headline numbers, each with what is needed to read it."""
    selected, pairs = _counts(content)
    shown = [Tile("Pairs kept", f"{selected:,}", f"of {pairs:,} scored: {label_for(content.select)}")]
    measure = main_measure(content.results) if content.results else None
    own = measure.values.get(SELECTED) if measure else None
    if measure and own:
        against = "ties count one half; 50% is no change" if measure.name == "win rate" else "50% is chance"
        shown.append(Tile(measure.name.capitalize(), f"{own.value:.1%}", f"{interval(own)}; {against}"))
    seeds = [estimate_from_json(entry["spearman"]) for entry in content.agreement.get("seeds") or []]
    between = [estimate for estimate in seeds if np.isfinite(estimate.value)]
    if between:
        low, high = (min(between), max(between))
        value = " – ".join(dict.fromkeys(f"{estimate.value:.2f}" for estimate in (low, high)))
        width = max((estimate.high - estimate.low) / 2 for estimate in between)
        shown.append(
            Tile("Agreement of seeds", value, f"Spearman's correlation of difficulty, ± {width:.2f}")
        )
    chance = content.agreement.get("above_chance")
    above = estimate_from_json(chance) if chance else None
    if above and np.isfinite(above.value):
        name, meaning = chance_in_words(content.agreement.get("chance_loss", LN_2))
        shown.append(Tile(f"Above {name}", f"{above.value:.1%}", f"{interval(above)}; {meaning}"))
    return shown


def headline(content: ReportContent) -> list[str]:
    """What was run and what was measured, a sentence each, with 95% intervals."""
    selected, pairs = _counts(content)
    sentences = [
        f"{pairs:,} pairs were scored by models that were not trained on them; "
        f"{selected:,} were kept ({label_for(content.select)})."
    ]
    quarantined = int(content.curriculum.facts.get("quarantined") or 0)
    if quarantined:
        sentences.append(
            f"{quarantined:,} more {'has' if quarantined == 1 else 'have'} no difficulty, since a "
            "log-probability or loss is not finite; none of them was selected."
        )
    without = content.curriculum.facts.get("missing_scorers") or []
    if without:
        sentences.append(f"Records are missing of {', '.join(map(str, without))}.")
    partial = int(content.curriculum.facts.get("partial") or 0)
    if partial:
        sentences.append(f"{partial:,} pairs lack some of their records and were ranked by those they have.")
    if content.results is None:
        return [
            *sentences,
            "No evaluation is part of this run, so nothing is said about what training on them gives.",
        ]
    return sentences + _evaluation(content.results)


def _evaluation(results: EvaluationResults) -> list[str]:
    measure = main_measure(results)
    if measure is None:
        return ["The evaluation compared no answers and had no held-out pairs."]
    sentences = []
    own = measure.values.get(SELECTED)
    if own and measure.name == "win rate":
        sentences.append(
            f"The policy trained on them wins {own.value:.1%} of the comparisons with its starting model "
            f"({interval(own)}; {results.prompts:,} held-out prompts, {results.samples:,} "
            f"{'answer' if results.samples == 1 else 'answers'} each, judged by "
            f"{_JUDGES.get(results.judge, results.judge)}): {_AGAINST_HALF[_side(own, 0.5)]}."
        )
    elif own:
        sentences.append(
            f"The policy trained on them prefers the chosen answer in {own.value:.1%} of the held-out pairs "
            f"({interval(own)})."
        )
    controls = [arm for arm in results.arms if arm.name not in (SELECTED, REFERENCE)]
    return sentences + [_comparison(arm, arm.difference) for arm in controls if arm.difference]


def _comparison(arm: ArmResult, difference: Estimate) -> str:
    measured = (
        f"{100 * difference.value:+.1f} percentage points "
        f"(95% interval {100 * difference.low:+.1f} to {100 * difference.high:+.1f}, paired by prompt)"
    )
    side = _side(difference, 0.0)
    if side == 0:
        return f"This run does not tell its win rate from that of “{arm.label}”: {measured}."
    return f"Its win rate is {'higher' if side > 0 else 'lower'} than that of “{arm.label}”: {measured}."


def _side(estimate: Estimate, zero: float) -> int:
    """1 or -1 where the whole interval is above or below `zero`, else 0, also where there is no interval."""
    return int(estimate.low > zero) - int(estimate.high < zero)


def agreement_note(agreement: Mapping[str, Any]) -> str:
    """How to read overlaps, and how wide the heat map's intervals are."""
    notes = ["Half the 95% interval follows each number (bootstrap over prompts)."]
    fraction = agreement.get("fraction")
    if fraction is not None:
        notes.append(f"Unrelated selections of this size would overlap by {fraction:.0%}.")
    low, high = (
        np.array(agreement.get(name) or [], dtype=float) for name in ("spearman_low", "spearman_high")
    )
    if low.size and np.isfinite(high - low).any():
        notes.append(f"In the picture no interval is wider than ± {np.nanmax(high - low) / 2:.2f}.")
    return " ".join(notes)


def interval(estimate: Estimate) -> str:
    """The 95% interval of a share, in words."""
    if np.isnan(estimate.low):
        return "no interval: one prompt only"
    return f"95% interval {estimate.low:.1%} to {estimate.high:.1%}"


def _counts(content: ReportContent) -> tuple[int, int]:
    selected_P = np.asarray(content.curriculum.table["selected"])
    return int(selected_P.sum()), len(selected_P)
