"""Results as text: labels, numbers with their intervals, and the user's texts made safe to show."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from selective_dpo.config import DEFAULT_FRACTION, SelectConfig
from selective_dpo.criteria import CRITERIA
from selective_dpo.curriculum.agreement import MIN_CHECK, MIN_MOVEMENT
from selective_dpo.curriculum.audit import Audit
from selective_dpo.evaluation.results import (
    REFERENCE,
    SELECTED,
    EvaluationResults,
    estimate_from_json,
    main_measure,
    training_spread,
)
from selective_dpo.identity import Text
from selective_dpo.losses import LN_2
from selective_dpo.stats.estimates import Estimate
from selective_dpo.storage.digests import canonical_json

LONGEST_SHOWN = 1500
"""Characters of a message that a page shows."""

_LONGEST_PREVIEW = 160
_LOPSIDED = 0.2
"""An interval whose sides differ by more than this share of its width is shown by its ends."""
_REPLACEMENT = "\ufffd"
# They turn the direction of what follows, so that a text could show otherwise than it is.
_DIRECTION_MARKS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Turn(NamedTuple):
    """One message as it is shown. `role` is empty for plain text."""

    role: str
    text: str
    cut: int
    """Characters of the message that are left out at its end."""


def label_for(select: SelectConfig) -> str:
    """A selection and its order in words, such as "easiest 50%, easy to hard"."""
    if select.count is not None:
        size = f"{select.count:,} pairs"
    else:
        size = f"{100 * (DEFAULT_FRACTION if select.fraction is None else select.fraction):.4g}%"
    low, high = select.band or (0.0, 1.0)
    which = {
        "below": f"difficulty <= {select.threshold or 0.0:.4g}",
        "band": f"quantiles {low:g}-{high:g}",
        "all": "all pairs",
    }.get(select.rule, f"{select.rule} {size}")
    by = f"by {Path(select.source).name}" if select.source else CRITERIA[select.aggregate].label
    held = f"balanced by {' and '.join(select.balance)}" if select.balance else ""
    shares = ", ".join(f"{name} at least {100 * share:g}%" for name, share in select.quota.items())
    less = "length taken out" if select.residual else ""
    done = ", ".join(f"{flag.replace('_', ' ')}: {action}" for flag, action in select.action.items())
    return ", ".join(filter(None, (which, select.order.replace("-", " "), by, held, shares, less, done)))


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Rows under a header and a rule; the first `left` columns are flush left, the others right."""
    cells = [[printable(cell).replace("\n", " ") for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])


def arms_table(results: EvaluationResults) -> str:
    """Each arm: what it was trained on, its win rate or held-out accuracy, its difference to the run's own.

    The difference is that of the run's own policy minus the arm, paired by prompt, in percentage points.
    Where answers differ in length, the win rate at equal length and the mean length follow.
    """
    measure = main_measure(results)
    with_difference = any(arm.difference for arm in results.arms if arm.name != SELECTED)
    header = ["arm", "selection", "pairs", "updates"]
    header += [f"{measure.name} (95%)"] if measure else []
    at_equal_length = any(arm.length_controlled for arm in results.arms)
    header += ["selected minus it"] if with_difference else []
    header += ["at equal length", "characters"] if at_equal_length else []
    rows = []
    for arm in results.arms:
        trained = [""] * 2 if arm.name == REFERENCE else [f"{arm.pairs:,}", f"{arm.updates:,}"]
        row = [arm.name, arm.label, *trained]
        row += [share_with_interval(measure.values.get(arm.name))] if measure else []
        row += (
            ["" if arm.name == SELECTED else points_with_interval(arm.difference)] if with_difference else []
        )
        if at_equal_length:
            row += [share_with_interval(arm.length_controlled)]
            row += [number_with_interval(arm.answer_characters, 1)]
        rows.append(row)
    note = [] if measure is None else ["", seeds_note(results)]
    return "\n".join([text_table(header, rows, left=2), *note])


def seeds_note(results: EvaluationResults) -> str:
    """What the intervals leave out: how far trainings lie apart that differ by their seed alone."""
    spread = training_spread(results)
    if spread is None:
        return (
            "The intervals are over prompts. Another seed of the same training moves a result as well, in "
            "the paper by 0.6 to 1.4 points; evaluate.training_seeds measures how far."
        )
    values = ", ".join(f"{value:.1%}" for value in spread.values)
    return (
        f"{len(spread.values)} trainings of selected that differ by their seed alone: {spread.measure} "
        f"{spread.mean:.1%} on average, with a standard deviation of {100 * spread.deviation:.1f} points "
        f"({values}). The intervals are over prompts and leave that out."
    )


def displacement_notes(results: EvaluationResults) -> list[str]:
    """A warning for each policy that has made the chosen answers of the held-out pairs less likely, too."""
    notes = []
    for arm in results.policies:
        held_out = arm.held_out
        if held_out is not None and held_out.both_fall:
            changes = (held_out.chosen_change, held_out.rejected_change)
            decimals = 1 if all(change and abs(change.value) >= 1.0 for change in changes) else 3
            chosen, rejected = (number_with_interval(change, decimals) for change in changes)
            notes.append(
                f"Warning: {arm.name} makes the chosen answers of held-out pairs less likely ({chosen} "
                f"nats), as the rejected ones ({rejected}): look at its answers before you use it, and try a "
                "lower learning rate, fewer epochs or a larger beta."
            )
    return notes


def side_effect_notes(results: EvaluationResults) -> list[str]:
    """A warning for each policy whose answers or whose sense of other text are clearly worse."""
    return [
        f"Warning: {arm.name} beside the starting model: {', '.join(arm.side_effects.worse)}."
        for arm in results.policies
        if arm.side_effects is not None and arm.side_effects.worse
    ]


def agreement_rows(agreement: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """For each two seeds: names, Spearman's correlation, overlap of the selected, Jaccard; with intervals."""
    return [
        (
            f"{entry['a']} and {entry['b']}",
            *(
                number_with_interval(estimate_from_json(entry[name]))
                for name in ("spearman", "overlap", "jaccard")
            ),
        )
        for entry in agreement.get("seeds") or []
    ]


def agreement_table(agreement: Mapping[str, Any]) -> str:
    """Agreement of each two seeds, with 95% intervals, and the share of pairs above chance."""
    parts = []
    if rows := agreement_rows(agreement):
        header = ["agreement (95%)", "Spearman", "overlap of selected", "Jaccard"]
        parts.append(text_table(header, [(f"seeds {name}", *numbers) for name, *numbers in rows]))
    if agreement.get("above_chance"):
        above = share_with_interval(estimate_from_json(agreement["above_chance"]))
        name, meaning = describe_chance(agreement.get("chance_loss", LN_2))
        parts.append(f"pairs above {name} ({meaning}): {above}")
    return "\n".join(parts)


def audit_rows(found: Audit) -> list[tuple[str, str, str]]:
    """Of a selection: what is compared, its kept side, its dropped side."""
    rows = [
        (f"{group.what} {group.name}, {group.pairs:,} pairs", share_with_interval(group.kept), "")
        for group in found.groups
    ]
    return rows + [
        (mean.what, number_with_interval(mean.kept, 1), number_with_interval(mean.dropped, 1))
        for mean in found.means
    ]


def audit_text(found: Audit) -> str:
    """The same as lines, and a warning for each group that loses more than twice the average."""
    lines = [
        f"{what}: {kept} kept" + (f", {dropped} dropped" if dropped else "")
        for what, kept, dropped in audit_rows(found)
    ]
    return "\n".join([*lines, *(f"Warning: {warning}" for warning in found.warnings)])


def movement_note(agreement: Mapping[str, Any]) -> str:
    """What to think of scorers that hardly moved; empty where they did, or where nothing is known."""
    movement, chance = agreement.get("movement"), agreement.get("chance_loss")
    if movement is None or chance is None or movement >= MIN_MOVEMENT:
        return ""
    return (
        f"Warning: the scorers hardly moved: losses differ from {chance:.4g}, which says nothing, by "
        f"{movement:.2g} (root mean square). Their order is mostly noise, and so is what is selected by it. "
        "Score more pairs, or by protocol one-step; or give trained scorers more updates (smaller batches, "
        "more epochs) or a higher learning rate."
    )


def check_note(check: Mapping[str, Any] | None) -> str:
    """What `score.check` found, and what to do where one-step does not describe the training; or nothing."""
    if not check:
        return ""
    spearman, overlap, evaluations = (
        estimate_from_json(check[name]) for name in ("spearman", "overlap", "evaluations")
    )
    found = (
        f"check: with scorers trained on {check['pairs']:,} pairs one-step agrees to "
        f"{number_with_interval(spearman)} (Spearman), and {share_with_interval(overlap)} of the easiest "
        "half are the same; their own two evaluations, which share one training, agree to "
        f"{number_with_interval(evaluations)}."
    )
    if spearman.value >= MIN_CHECK:
        return found
    return (
        f"{found} Warning: that is less than {MIN_CHECK:g}, so one-step does not describe this model under "
        "these settings of training: use score.protocol fast or paper, or a lower learning rate."
    )


def describe_chance(chance: float) -> tuple[str, str]:
    """The loss of a policy that has not moved, and what it means for a pair to lie above it.

    At ln 2, of DPO's own loss and those like it, a loss is above it exactly where the margin is below 0.
    """
    if chance == LN_2:
        return "ln 2", "the scorers disagree with the label"
    return f"{chance:.4g}", "the scorers do worse than a policy that has not moved"


def share_with_interval(estimate: Estimate | None) -> str:
    """A share in percent and half its 95% interval: "55.8% ± 1.4"; or both ends: "98.0% [93.1, 99.4]"."""
    return _with_interval(estimate, ".1f", scale=100, unit="%")


def points_with_interval(estimate: Estimate | None) -> str:
    """A difference of shares in percentage points: "+2.6 ± 1.4"."""
    return _with_interval(estimate, ".1f", scale=100, sign="+")


def number_with_interval(estimate: Estimate | None, decimals: int = 2) -> str:
    """A number and half its 95% interval: "0.94 ± 0.01"."""
    return _with_interval(estimate, f".{decimals}f")


def _with_interval(
    estimate: Estimate | None, form: str, *, scale: float = 1, sign: str = "", unit: str = ""
) -> str:
    if estimate is None or math.isnan(estimate.value):
        return ""
    value = f"{scale * estimate.value:{sign}{form}}{unit}"
    below, above = scale * (estimate.value - estimate.low), scale * (estimate.high - estimate.value)
    # With one prompt only there is no standard error.
    if math.isnan(below + above):
        return f"{value} (no interval)"
    if abs(above - below) > _LOPSIDED * (above + below) and f"{above:{form}}" != f"{below:{form}}":
        return f"{value} [{scale * estimate.low:{sign}{form}}, {scale * estimate.high:{sign}{form}}]"
    return f"{value} ± {(above + below) / 2:{form}}"


def printable(text: str) -> str:
    """`text` with U+FFFD for control characters other than line breaks and tabs, lone surrogates, and marks
    that turn the direction of writing."""
    return "".join(
        character
        if character in "\n\t"
        or (unicodedata.category(character) not in ("Cc", "Cs") and character not in _DIRECTION_MARKS)
        else _REPLACEMENT
        for character in text.replace("\r\n", "\n")
    )


def turns(text: Text, longest: int | None = LONGEST_SHOWN) -> tuple[Turn, ...]:
    """The messages of `text`, each cut after `longest` characters (None: whole); plain text is one."""
    if isinstance(text, str):
        return (_turn("", text, longest),)
    return tuple(_turn(str(message.get("role", "")), message.get("content"), longest) for message in text)


def preview(text: Text) -> str:
    """The beginning of `text`, or of its last message, on one line."""
    last = text if isinstance(text, str) else (text[-1].get("content") if text else "")
    return " ".join(_turn("", last, LONGEST_SHOWN).text[:_LONGEST_PREVIEW].split())


def _turn(role: str, content: object, longest: int | None) -> Turn:
    # Content that is not a string (parts, tool calls) is shown as the JSON that it is.
    text = content if isinstance(content, str) else canonical_json(content)
    shown = text[:longest]
    return Turn(printable(role), printable(shown), len(text) - len(shown))
