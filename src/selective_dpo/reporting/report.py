"""`report.html`: one file, no script, no network; every text that is not ours is escaped."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from selective_dpo.artifacts import write_atomic
from selective_dpo.core.results import REFERENCE, SELECTED, estimate_from_json
from selective_dpo.data.pairs import KEPT
from selective_dpo.locks import holding, lock_beside
from selective_dpo.reporting import narrative, tables
from selective_dpo.reporting.arm_figures import arms_svg, training_svg
from selective_dpo.reporting.content import DropCount, ReportContent, load_report_content
from selective_dpo.reporting.figures import agreement_svg, difficulty_svg, length_svg
from selective_dpo.reporting.text import preview, printable, turns

REPORT = "report.html"


class Table(NamedTuple):
    """A table of ready-made texts; the first column is flush left."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


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
    style = _own_file("report.css")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable_unless_markup,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = {
        "difficulty": difficulty_svg(content),
        "agreement": agreement_svg(content),
        "length": length_svg(content),
        "arms": arms_svg(content),
        "training": training_svg(content),
    }
    return environment.from_string(_own_file("report.html.j2")).render(
        content=content,
        # Our own style sheet and drawings are the only markup that is not escaped.
        style=Markup(style),
        style_hash=Markup(_style_hash(style)),
        figures={name: Markup(svg) for name, svg in figures.items() if svg},
        tiles=narrative.tiles(content),
        headline=narrative.headline(content),
        arms=_arms(content),
        seeds=_seeds(content.agreement),
        drops=_drops(content.drops),
        truth=_truth(content),
        provenance=_facts(content.provenance),
        cost=_facts(content.cost),
        config=json.dumps(content.config, indent=2) if content.config else "",
        seeds_note=tables.seeds_note(content.results) if content.results else "",
        agreement_note=narrative.agreement_note(content.agreement),
        preview=preview,
        turns=turns,
    )


def _own_file(name: str) -> str:
    return resources.files("selective_dpo.reporting").joinpath(name).read_text("utf-8")


def _style_hash(style: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(style.encode('utf-8')).digest()).decode('ascii')}"


def _printable_unless_markup(value: object) -> object:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _arms(content: ReportContent) -> Table | None:
    if content.results is None:
        return None
    rows = []
    for arm in content.results.arms:
        held_out = arm.held_out
        trained = ("–", "–") if arm.name == REFERENCE else (f"{arm.pairs:,}", f"{arm.updates:,}")
        row = (
            f"{arm.label} ({arm.name})",
            *trained,
            tables.share_with_reach(arm.win_rate) or "–",
            "–" if arm.name == SELECTED else tables.points_with_reach(arm.difference) or "–",
            tables.share_with_reach(held_out.accuracy) if held_out else "–",
            tables.number_with_reach(held_out.loss, 3) if held_out else "–",
            tables.number_with_reach(arm.answer_tokens, 1) or "–",
        )
        rows.append(row)
    header = (
        "Trained on",
        "Pairs",
        "Updates",
        "Win rate",
        "Selected minus it (points)",
        "Held-out accuracy",
        "Held-out loss",
        "Answer tokens",
    )
    return _without_empty_columns(Table(header, tuple(rows)))


def _without_empty_columns(table: Table) -> Table:
    kept = [column for column in range(len(table.header)) if any(row[column] != "–" for row in table.rows)]
    return Table(
        tuple(table.header[column] for column in kept),
        tuple(tuple(row[column] for column in kept) for row in table.rows),
    )


def _seeds(agreement: Mapping[str, Any]) -> Table | None:
    rows = tuple(
        (
            f"{entry['a']} and {entry['b']}",
            *(
                tables.number_with_reach(estimate_from_json(entry[name])) or "–"
                for name in ("spearman", "overlap", "jaccard")
            ),
        )
        for entry in agreement.get("seeds") or []
    )
    return Table(("Seeds", "Spearman", "Overlap of the selected", "Jaccard"), rows) if rows else None


def _drops(drops: tuple[DropCount, ...]) -> Table:
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
    sums = [sum(rows for (of, _), rows in count.items() if of == source) for source in shown]
    rows.append(("all input rows", *(f"{rows:,}" for rows in sums), f"{sum(totals.values()):,}"))
    return Table(("Status", *shown, "Rows"), tuple(rows))


def _truth(content: ReportContent) -> Table | None:
    rows = tuple(
        (row.group, tables.share_with_reach(row.selected), tables.share_with_reach(row.deselected))
        for row in content.truth
    )
    return Table(("Share of the pairs", "Selected", "Not selected"), rows) if rows else None


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
