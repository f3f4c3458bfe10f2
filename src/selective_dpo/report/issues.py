"""The issues of a run as text: how many pairs have each flag, and how well planted labels are found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selective_dpo.curriculum.issues import TABLE
from selective_dpo.evaluation.results import estimate_from_json
from selective_dpo.report.tables import number_with_interval, printable, share_with_interval, text_table


def flag_rows(facts: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """For each flag: its name, how many pairs have it, their share, how many are selected, its meaning."""
    return [
        (
            flag.replace("_", " "),
            f"{found['pairs']:,}",
            share_with_interval(estimate_from_json(found["share"])),
            f"{found['selected']:,}",
            found["meaning"],
        )
        for flag, found in facts["flags"].items()
    ]


def issues_text(facts: Mapping[str, Any], folder: Path) -> str:
    """All of it, for a terminal."""
    rows = flag_rows(facts)
    header = ["flag", "pairs", "share (95%)", "selected"]
    lines = [
        f"{facts['pairs']:,} pairs, {facts['selected']:,} of them selected; p_wrong: how likely a fresh "
        "label contradicts the pair's",
        "",
        text_table(header, [row[:4] for row in rows]),
        "",
        *(f"{row[0]}: {row[4]}" for row in rows),
    ]
    if plant := facts.get("plant"):
        lines += ["", *planted_lines(plant)]
    return "\n".join([*lines, "", printable(str(folder / TABLE))])


def planted_lines(plant: Mapping[str, Any]) -> list[str]:
    """What was found of planted labels, and what that does not show."""
    precision = "; ".join(
        f"{share_with_interval(estimate_from_json(found))} of the first {int(size):,}"
        for size, found in plant["precision"].items()
    )
    bound, confidence, limit = f"{plant['bound']:.0%}", f"{plant['confidence']:.0%}", plant["limit"]
    if limit is None:
        where = f"no threshold is known to keep false alarms at {bound} or less of the flagged"
    else:
        where = (
            f"flagging p_wrong of {limit['threshold']:.3g} and more keeps false alarms at {bound} or less of "
            f"the flagged, with a confidence of {confidence}: {limit['flagged']:,} pairs, "
            f"{limit['false_alarms']:.0%} of them not planted; {limit['own_flagged']:,} pairs by their label"
        )
    auroc = number_with_interval(estimate_from_json(plant["auroc"]))
    return [
        f"planted: {plant['planted']:,} labels ({plant['share']:.3g} of the pairs), turned round on purpose",
        f"  AUROC {auroc}; planted are {precision}, by p_wrong (95% intervals over prompts)",
        f"  {where}",
        "  All other labels count as right here: one that is wrong counts as a false alarm. Planted errors "
        "are easier to find than real ones, which crowd where answers are nearly as good as each other.",
    ]
