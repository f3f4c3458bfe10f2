"""`report.html`: one file, no script, no network. Every text that is not ours is escaped.

First the page and its tables, then the headline: measured numbers in sentences that their intervals bear out.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup

from selective_dpo.curriculum.audit import Audit
from selective_dpo.curriculum.import_ import imported_in_words
from selective_dpo.data.adapters import KEPT
from selective_dpo.evaluation.results import (
    REFERENCE,
    SELECTED,
    ArmResult,
    EvaluationResults,
    estimate_from_json,
    main_measure,
)
from selective_dpo.losses import LN_2
from selective_dpo.models import merge_command
from selective_dpo.report.content import CURVES, DropCount, ReportContent, load_report_content
from selective_dpo.report.figures import FIGURES, spearman_in_words
from selective_dpo.report.issues import flag_rows, planted_lines
from selective_dpo.report.tables import (
    agreement_rows,
    audit_rows,
    check_note,
    describe_chance,
    displacement_notes,
    label_for,
    movement_note,
    number_with_interval,
    points_with_interval,
    preview,
    printable,
    seeds_note,
    share_with_interval,
    turns,
)
from selective_dpo.stats.estimates import Estimate
from selective_dpo.stats.side_effects import TaskScore
from selective_dpo.storage.artifacts import write_atomic
from selective_dpo.storage.locks import holding, lock_beside

REPORT = "report.html"


class Table(NamedTuple):
    """A table of ready-made texts; the first column is flush left."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class Tile(NamedTuple):
    """One number that stands large at the top of the page."""

    name: str
    value: str
    note: str


def write_report(run_folder: Path) -> Path:
    """Render the report of a run folder to its `report.html`, atomically, and return the path.

    Raises:
        ArtifactError: pairs or curriculum are missing, or a file is damaged.
        IdentityError: the curriculum holds pairs that `pairs/` does not.
        BusyError: another process is writing it.
    """
    path = run_folder / REPORT
    with holding(lock_beside(path), what=str(path)):
        write_atomic(path, render_report(load_report_content(run_folder)))
    return path


def render_report(content: ReportContent) -> str:
    """The report as the text of one HTML file."""
    figures = {name: draw(content) for name, draw in FIGURES.items()}
    seeds = tuple(tuple(number or "–" for number in numbers) for numbers in agreement_rows(content.agreement))
    truth = tuple(
        (row.group, share_with_interval(row.selected), share_with_interval(row.deselected))
        for row in content.truth
    )
    return render_page(
        "report.html.j2",
        kicker="run report",
        title=content.title,
        subtitle=content.subtitle,
        content=content,
        figures={name: Markup(svg) for name, svg in figures.items() if svg},
        tiles=tiles(content),
        headline=headline(content),
        arms=_arms_table(content.results) if content.results else None,
        seeds=Table(("Seeds", "Spearman", "Overlap of the selected", "Jaccard"), seeds) if seeds else None,
        drops=_drops_table(content.drops),
        guard=_guard_table(content.guard) if content.guard else None,
        audit=_audit_table(content.audit) if content.audit else None,
        issues=_issues_table(content.issues) if content.issues else None,
        planted=planted_lines(content.issues["plant"])
        if content.issues and "plant" in content.issues
        else [],
        truth=Table(("Share of the pairs", "Selected", "Not selected"), truth) if truth else None,
        provenance=_facts(content.provenance),
        cost=_facts(content.cost),
        config=json.dumps(content.config, indent=2) if content.config else "",
        seeds_note=seeds_note(content.results) if content.results else "",
        single_points=_single_points(content),
        agreement_note=_agreement_note(content.agreement),
        preview=preview,
        turns=turns,
        script_data=content.packed.data if content.packed else "",
    )


def render_page(
    template: str, *, kicker: str, title: str, subtitle: str, script_data: str = "", **values: Any
) -> str:
    """A page of this package as the text of one HTML file, whose policy allows it to load nothing.

    `template` extends `base.html.j2`; `values` are what it shows, in which only `Markup` is not escaped. With
    `script_data`, base64 that `browser.js` reads, that script may run, and no other; else none may.
    """
    folder = resources.files("selective_dpo.report")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: (
            printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
        ),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = folder.joinpath("report.css").read_text("utf-8")
    script = folder.joinpath("browser.js").read_text("utf-8") if script_data else ""
    return environment.get_template(template).render(
        kicker=kicker,
        title=title,
        subtitle=subtitle,
        # Our own style sheet and drawings are the only markup that is not escaped.
        style=Markup(style),
        style_hash=Markup(f"sha256-{_sha256(style)}"),
        script=Markup(script),
        script_hash=Markup(f"sha256-{_sha256(script)}"),
        script_data=script_data,
        **values,
    )


def _sha256(text: str) -> str:
    """As a content security policy wants it."""
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _arms_table(results: EvaluationResults) -> Table:
    """One row an arm; columns that no arm has a value for are left out."""
    rows = [
        {
            "Trained on": f"{arm.label} ({arm.name})",
            "Pairs": "" if arm.name == REFERENCE else f"{arm.pairs:,}",
            "Updates": "" if arm.name == REFERENCE else f"{arm.updates:,}",
            "Win rate": share_with_interval(arm.win_rate),
            "Selected minus it (points)": ""
            if arm.name == SELECTED
            else points_with_interval(arm.difference),
            "Win rate at equal length": share_with_interval(arm.length_controlled),
            "Selected minus it at equal length": points_with_interval(arm.length_controlled_difference),
            "Held-out accuracy": share_with_interval(arm.held_out.accuracy if arm.held_out else None),
            "Held-out loss": number_with_interval(arm.held_out.loss if arm.held_out else None, 3),
            "Chosen log-prob change": number_with_interval(
                arm.held_out.chosen_change if arm.held_out else None, 1
            ),
            "Rejected log-prob change": number_with_interval(
                arm.held_out.rejected_change if arm.held_out else None, 1
            ),
            "Answer tokens": number_with_interval(arm.answer_tokens, 1),
            "Answer characters": number_with_interval(arm.answer_characters, 1),
            "Answers that end": _of_change(arm, "ended"),
            "Repeated 4-grams": _of_change(arm, "repeated"),
            "Perplexity of other text": _perplexity(arm),
        }
        for arm in results.arms
    ]
    header = tuple(name for name in rows[0] if any(row[name] for row in rows))
    return Table(header, tuple(tuple(row[name] or "–" for name in header) for row in rows))


def _of_change(arm: ArmResult, name: str) -> str:
    found = getattr(arm.side_effects, name, None)
    return share_with_interval(found.value) if found else ""


def _perplexity(arm: ArmResult) -> str:
    """Perplexity, and its ratio to the starting model's."""
    found = arm.side_effects.nats if arm.side_effects else None
    if found is None:
        return ""
    shown = f"{math.exp(found.value.value):.2f}"
    if found.minus_start is None:
        return shown
    ratio, low, high = (math.exp(each) for each in (found.minus_start.value, *found.minus_start[2:]))
    return f"{shown} (x {ratio:.3f}, {low:.3f} to {high:.3f})"


def _single_points(content: ReportContent) -> str:
    """The training curves of one point, which cannot be drawn, in a line; empty where there are none."""
    points = [
        f"{title.lower()} of {log.arm} {curve.values[0]:.4g} at step {curve.steps[0]:,}"
        for log in content.training_logs
        for name, title in CURVES.items()
        if len((curve := getattr(log, name)).steps) == 1
    ]
    return f"Logged once only, so not drawn as a curve: {'; '.join(points)}." if points else ""


def _issues_table(facts: Mapping[str, Any]) -> Table:
    return Table(("Flag", "Pairs", "Share", "Selected", "Raised where"), tuple(flag_rows(facts)))


def _guard_table(found: Sequence[tuple[str, TaskScore]]) -> Table:
    rows = [
        (
            f"{score.task} {score.metric}",
            arm,
            share_with_interval(score.score.value),
            points_with_interval(score.score.minus_start),
            "" if score.score.minus_start is None else score.verdict,
        )
        for arm, score in found
    ]
    return Table(("Task", "Policy", "Score", "Minus the starting model (points)", ""), tuple(sorted(rows)))


def _audit_table(found: Audit) -> Table:
    return Table(("", "Kept", "Dropped"), tuple(audit_rows(found)))


def _drops_table(drops: tuple[DropCount, ...]) -> Table:
    """Rows of each status, by source where there are several."""
    sources = sorted({drop.source for drop in drops})
    totals: dict[str, int] = {}
    for drop in drops:
        totals[drop.status] = totals.get(drop.status, 0) + drop.rows
    statuses = sorted(totals, key=lambda status: (status != KEPT, -totals[status], status))
    count = {(drop.source, drop.status): drop.rows for drop in drops}
    shown = sources if len(sources) > 1 else []
    rows = [
        (status, *(f"{count.get((source, status), 0):,}" for source in shown), f"{totals[status]:,}")
        for status in statuses
    ]
    sums = [sum(drop.rows for drop in drops if drop.source == source) for source in shown]
    rows.append(("all input rows", *(f"{rows:,}" for rows in sums), f"{sum(totals.values()):,}"))
    return Table(("Status", *shown, "Rows"), tuple(rows))


def _facts(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, item in value.items():
        if isinstance(item, Mapping):
            rows += _facts(item, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", _plain(item)))
    return rows


def _plain(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return str(value)


_JUDGES = {
    "embedded-world": "the world's own gold reward",
    "constraints": "a program that checks the instruction",
    "reward-model": "a reward model",
}


def tiles(content: ReportContent) -> list[Tile]:
    """Up to four headline numbers, each with what is needed to read it."""
    selected, pairs = _counts(content)
    scored = "with a difficulty" if content.imported else "scored"
    shown = [Tile("Pairs kept", f"{selected:,}", f"of {pairs:,} {scored}: {label_for(content.select)}")]
    measure = main_measure(content.results) if content.results else None
    own = measure.values.get(SELECTED) if measure else None
    if measure and own:
        against = "ties count one half; 50% is no change" if measure.name == "win rate" else "50% is chance"
        shown.append(Tile(measure.name.capitalize(), f"{own.value:.1%}", f"{_interval(own)}; {against}"))
    seeds = [estimate_from_json(entry["spearman"]) for entry in content.agreement.get("seeds") or []]
    between = [estimate for estimate in seeds if np.isfinite(estimate.value)]
    if between:
        value = " – ".join(dict.fromkeys(f"{each.value:.2f}" for each in (min(between), max(between))))
        width = max((estimate.high - estimate.low) / 2 for estimate in between)
        shown.append(
            Tile("Agreement of seeds", value, f"Spearman's correlation of difficulty, ± {width:.2f}")
        )
    chance = content.agreement.get("above_chance")
    above = estimate_from_json(chance) if chance else None
    if above and np.isfinite(above.value):
        name, meaning = describe_chance(content.agreement.get("chance_loss", LN_2))
        shown.append(Tile(f"Above {name}", f"{above.value:.1%}", f"{_interval(above)}; {meaning}"))
    return shown


def headline(content: ReportContent) -> list[str]:
    """What was run and what was measured, a sentence each, with 95% intervals."""
    selected, pairs = _counts(content)
    facts = content.curriculum.facts
    kept = f"{selected:,} were kept ({label_for(content.select)})."
    if content.imported is not None:
        sentences = [
            f"Difficulty was imported: {imported_in_words(content.imported)}.",
            f"Of {pairs:,}, {kept}",
        ]
    else:
        sentences = [f"{pairs:,} pairs were scored by models that were not trained on them; {kept}"]
    if not_finite := int(facts.get("quarantined") or 0):
        sentences.append(
            f"{not_finite:,} more {'has' if not_finite == 1 else 'have'} no difficulty, since a "
            "log-probability or loss is not finite; none of them was selected."
        )
    if without := facts.get("missing_scorers"):
        sentences.append(f"Records are missing of {', '.join(map(str, without))}.")
    if partial := int(facts.get("partial") or 0):
        sentences.append(f"{partial:,} pairs lack some of their records and were ranked by those they have.")
    sentences += filter(None, [movement_note(content.agreement), check_note(facts.get("check"))])
    sentences += _strongest_correlate(content)
    if content.results is None:
        nothing = "No evaluation is part of this run, so nothing is said about what training on them gives."
        return [*sentences, nothing]
    return (
        sentences
        + _evaluation_sentences(content.results)
        + [*content.results.judge_notes, *displacement_notes(content.results)]
    )


def closing(run_folder: Path) -> list[str]:
    """What a finished run says last: headline, agreement, where the policy is, and what comes next."""
    content = load_report_content(run_folder)
    lines = [*headline(content), *_agreement_sentence(content), ""]
    policy = run_folder / "policy"
    lines.append(f"policy: {policy}")
    if (policy / "adapter_config.json").is_file():
        merge = merge_command(str(policy), str(policy), f"{policy}-merged")
        lines.append(f"  an adapter: load it with peft, or merge it: {merge}")
    shown = shlex.quote(str(run_folder))
    return [
        *lines,
        f"next: selective-dpo inspect {shown} --web     # the report, with every pair",
        f"      selective-dpo issues {shown}            # which pairs look wrong",
        f"      selective-dpo export {shown} --format trl --out {shlex.quote(str(run_folder / 'trl'))}",
    ]


def _agreement_sentence(content: ReportContent) -> list[str]:
    found = [estimate_from_json(entry["spearman"]) for entry in content.agreement.get("seeds") or []]
    known = sorted((each for each in found if np.isfinite(each.value)), key=lambda each: each.value)
    if not known:
        return []
    least = known[0]
    return [
        f"Repetitions of the scoring agree to {least.value:.2f} at least (Spearman, 95% interval "
        f"{least.low:.2f} to {least.high:.2f})."
    ]


def _strongest_correlate(content: ReportContent) -> list[str]:
    """The length that difficulty follows most closely; nothing where no interval is clear of zero."""
    clear = [each for each in content.length_correlations if _side(each.spearman, 0.0)]
    if not clear:
        return []
    strongest = max(clear, key=lambda each: abs(each.spearman.value))
    found = spearman_in_words(strongest.spearman)
    return [f"Of the lengths, difficulty follows the {strongest.name} most closely: {found}."]


def _evaluation_sentences(results: EvaluationResults) -> list[str]:
    measure = main_measure(results)
    if measure is None:
        return ["The evaluation compared no answers and had no held-out pairs."]
    sentences = []
    own = measure.values.get(SELECTED)
    if own and measure.name == "win rate":
        verdicts = ("this run does not tell the two apart", "it is better", "it is worse")
        sentences.append(
            f"The policy trained on them wins {own.value:.1%} of the comparisons with its starting model "
            f"({_interval(own)}; {results.prompts:,} held-out prompts, {results.samples:,} "
            f"{'answer' if results.samples == 1 else 'answers'} each, judged by "
            f"{_JUDGES.get(results.judge, results.judge)}): {verdicts[_side(own, 0.5)]}."
        )
    elif own:
        sentences.append(
            f"The policy trained on them prefers the chosen answer in {own.value:.1%} of the held-out pairs "
            f"({_interval(own)}): "
            + (
                "the interval holds 50%, so this shows nothing; more pairs in data.test narrow it.",
                "better than chance.",
                "worse than chance.",
            )[_side(own, 0.5)]
        )
    for arm in results.arms:
        if arm.name in (SELECTED, REFERENCE) or not arm.difference:
            continue
        low, value, high = (
            f"{100 * number:+.1f}"
            for number in (arm.difference.low, arm.difference.value, arm.difference.high)
        )
        measured = f"{value} percentage points (95% interval {low} to {high}, paired by prompt)"
        side = _side(arm.difference, 0.0)
        if side == 0:
            sentences.append(f"This run does not tell its win rate from that of “{arm.label}”: {measured}.")
        else:
            direction = "higher" if side > 0 else "lower"
            sentences.append(f"Its win rate is {direction} than that of “{arm.label}”: {measured}.")
    return sentences


def _side(estimate: Estimate, zero: float) -> int:
    """1 or -1 where the whole interval is above or below `zero`, else 0, also where there is no interval."""
    return int(estimate.low > zero) - int(estimate.high < zero)


def _agreement_note(agreement: Mapping[str, Any]) -> str:
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


def _interval(estimate: Estimate) -> str:
    """The 95% interval of a share, in words."""
    if np.isnan(estimate.low):
        return "no interval: one prompt only"
    return f"95% interval {estimate.low:.1%} to {estimate.high:.1%}"


def _counts(content: ReportContent) -> tuple[int, int]:
    """Selected pairs, and all with a difficulty."""
    selected_P = np.asarray(content.curriculum.table["selected"])
    return int(selected_P.sum()), len(selected_P)
