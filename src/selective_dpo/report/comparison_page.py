"""A comparison as tables in a terminal, and as one page with figures that loads and runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from selective_dpo.curriculum.measured import PAIR_CRITERIA
from selective_dpo.curriculum.stability import TARGET
from selective_dpo.losses import LN_2
from selective_dpo.report.comparison import HALF, Comparison, Likeness, SourceFindings
from selective_dpo.report.figures import ARM_COLORS, BLUE, CHANCE_LINE, FAINT, STYLED, new_figure, to_svg
from selective_dpo.report.page import Table, render_page
from selective_dpo.report.tables import number_with_interval, printable, text_table
from selective_dpo.stats.estimates import Estimate
from selective_dpo.storage.artifacts import write_atomic

SHOWN_FRACTIONS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""In tables; figures and JSON have all."""

NO_ADVICE = (
    "The share below ln 2 is no fraction to train on: at the three sizes that the paper swept it is about "
    "the same, and the best fractions differ (docs/analyses.md)."
)

_COLORS = (BLUE, *ARM_COLORS)


def comparison_text(found: Comparison) -> str:
    """The tables of a comparison, then what to know to read them."""
    parts = [text_table(*table) for table in _tables(found).values() if table.rows]
    return "\n\n".join([*parts, "\n".join(_notes(found))])


def write_comparison(found: Comparison, path: Path) -> Path:
    """Write the page, atomically, and return its path."""
    write_atomic(path, render_comparison(found))
    return path


def render_comparison(found: Comparison) -> str:
    """The page as the text of one HTML file."""
    figures = {"jaccard": jaccard_svg(found), "learned": learned_svg(found)}
    return render_page(
        "comparison.html.j2",
        kicker="comparison",
        title=" and ".join(each.name for each in found.sources),
        subtitle=_subtitle(found),
        figures={name: Markup(svg) for name, svg in figures.items() if svg},
        tables={
            name: Table(table.header, tuple(tuple(cell or "–" for cell in row) for row in table.rows))
            for name, table in _tables(found).items()
            if table.rows
        },
        notes=_notes(found),
    )


def _subtitle(found: Comparison) -> str:
    if len(found.sources) == 1:
        return f"{found.sources[0].pairs:,} pairs"
    return f"{found.common:,} pairs that all of them have"


# --- Tables -----------------------------------------------------------------------------------------------


def _tables(found: Comparison) -> dict[str, Table]:
    return {
        "sources": _sources_table(found.sources),
        "alike": _alike_table(found),
        "criteria": _criteria_table(found.sources),
    }


def _sources_table(sources: Sequence[SourceFindings]) -> Table:
    """A row a number, a column a source; rows that no source has are left out."""
    rows: list[tuple[str, ...]] = []

    def row(name: str, cells: Sequence[str]) -> None:
        if any(cells):
            rows.append((name, *cells))

    def estimated(name: str, values: Sequence[Estimate | None], decimals: int = 4) -> None:
        row(name, [number_with_interval(value, decimals) for value in values])

    row("pairs", [f"{source.pairs:,}" for source in sources])
    row("prompts", [f"{source.clusters:,}" if source.knows_prompts else "not known" for source in sources])
    row("seeds x evaluations", [_records(source) for source in sources])
    estimated("mean loss", [source.mean_loss for source in sources])
    at_ln_2 = all(source.chance_loss in (LN_2, None) for source in sources)
    chance = "ln 2" if at_ln_2 else "that of a policy that has not moved"
    estimated(f"mean loss below {chance}", [source.below_chance for source in sources])
    dynamics = [source.dynamics for source in sources]
    estimated("wrong in every record", [each and each.wrong_always for each in dynamics])
    deltas = [learned.delta for learned in next(filter(None, dynamics)).learned] if any(dynamics) else []
    for place, delta in enumerate(deltas):
        share = [each and each.learned[place].share for each in dynamics]
        estimated(f"learned by the end, delta {delta:g}", share)
    for place, delta in enumerate(deltas):
        spearman = [each and each.learned[place].spearman for each in dynamics]
        estimated(f"Spearman (learned step, difficulty), delta {delta:g}", spearman, 3)
    estimated("times forgotten, of a pair by a seed", [each and each.forgetting for each in dynamics])
    forgetting = [each and each.forgetting_spearman for each in dynamics]
    estimated("Spearman (times forgotten, difficulty)", forgetting, 3)
    estimated("Spearman (spread of losses, difficulty)", [each.spread_spearman for each in sources], 3)
    estimated("Spearman (spread of seeds, difficulty)", [each.seed_spread_spearman for each in sources], 3)
    ends = [source.first_last for source in sources]
    estimated("first and last evaluation, Spearman", [each and each.spearman for each in ends], 3)
    overlap = [each and each.of_half("overlap") for each in ends]
    estimated("first and last evaluation, overlap of easiest half", overlap, 3)
    estimated("two seeds, Jaccard of easiest half, the least", [each.least_alike for each in sources], 3)
    scorers = [source.scorers for source in sources]
    estimated("two seeds, overlap of easiest half, mean", [each and each.one_one for each in scorers], 3)
    estimated("one seed and the others, the same", [each and each.one_others for each in scorers], 3)
    estimated("all seeds and as many fresh ones, predicted", [each and each.fresh for each in scorers], 3)
    row(f"seeds needed for an overlap of {TARGET:g}, predicted", [_needed(source) for source in sources])
    return Table(("95% intervals", *(source.name for source in sources)), tuple(rows))


def _records(source: SourceFindings) -> str:
    return f"{len(source.seeds)} x {len(source.evaluations)}" if source.seeds else "difficulty alone"


def _needed(source: SourceFindings) -> str:
    if source.scorers is None:
        return ""
    return "no number of them" if source.scorers.needed is None else f"{source.scorers.needed}"


def _alike_table(found: Comparison) -> Table:
    """Any two sources, then any two seeds of each: Spearman, and Jaccard by fraction above that of chance."""
    likenesses = {f"{each.a} and {each.b}": each for each in found.alike}
    for source in found.sources:
        likenesses |= {f"{source.name}: {each.a} and {each.b}": each for each in source.seeds_alike}
    if not likenesses:
        return Table((), ())
    places = [found.fractions.index(fraction) for fraction in SHOWN_FRACTIONS]
    chance = ("by chance", "", "0", *(f"{found.jaccard_by_chance[place]:.3f}" for place in places))
    rows = [
        (
            name,
            f"{each.pairs:,}",
            number_with_interval(each.spearman, 3),
            *(number_with_interval(each.jaccard[place], 3) for place in places),
        )
        for name, each in likenesses.items()
    ]
    header = ("Jaccard of the easiest ...", "pairs", "Spearman", *(f"{each:.0%}" for each in SHOWN_FRACTIONS))
    return Table(header, (chance, *rows))


def _criteria_table(sources: Sequence[SourceFindings]) -> Table:
    """Other criteria beside each source's difficulty."""
    rows = tuple(
        (
            f"{source.name}: {each.a}" if len(sources) > 1 else each.a,
            f"{each.pairs:,}",
            number_with_interval(each.spearman, 3),
            number_with_interval(each.of_half("jaccard"), 3),
        )
        for source in sources
        for each in source.criteria
    )
    return Table(("criterion and difficulty", "pairs", "Spearman", f"Jaccard of easiest {HALF:.0%}"), rows)


def _notes(found: Comparison) -> list[str]:
    notes = [
        f"All intervals are 95%, clustered by prompt; those of selections by {found.replicates:,} resamples."
    ]
    for source in found.sources:
        if not source.knows_prompts:
            notes.append(f"{source.name}: prompts are not known, so each id counts as one.")
        notes += [f"{source.name}: {note}." for note in source.notes]
    if found.wrong_everywhere is not None:
        share = number_with_interval(found.wrong_everywhere, 4)
        notes.append(f"Wrong in every record of all {len(found.sources)}: {share} of the common pairs.")
    if any(source.dynamics for source in found.sources):
        notes.append(
            "A pair is learned at the first evaluation from which on its margin, beta times the difference "
            "of log-ratios, stays above delta: a delta above 0 depends on the scale of training."
        )
    shown = {each.a for source in found.sources for each in source.criteria} & set(PAIR_CRITERIA)
    notes += [
        f"{name}: {meaning}; larger is harder." for name, meaning in PAIR_CRITERIA.items() if name in shown
    ]
    if any(source.below_chance for source in found.sources):
        notes.append(NO_ADVICE)
    return [printable(note) for note in notes]


# --- Figures ----------------------------------------------------------------------------------------------


@STYLED
def jaccard_svg(found: Comparison) -> str | None:
    """Jaccard of the easiest pairs by fraction: of any two sources, of each source's seeds, and by chance."""
    panels: dict[str, dict[str, Likeness]] = {}
    if found.alike:
        panels["Any two sources"] = {f"{each.a} and {each.b}": each for each in found.alike}
    # Of several seeds the two that share least at a half.
    seeds = {
        source.name: min(source.seeds_alike, key=lambda each: each.of_half("jaccard"))
        for source in found.sources
        if source.seeds_alike
    }
    if seeds:
        panels["Two seeds, those that share least"] = seeds
    if not panels:
        return None
    figure, axes = new_figure(3.8, columns=len(panels), sharey=True)
    for panel, (title, lines) in zip(axes, panels.items(), strict=True):
        for color, (name, each) in zip(_cycled(len(lines)), lines.items(), strict=True):
            _draw(panel, each.fractions, each.jaccard, color, name)
        panel.plot(found.fractions, found.jaccard_by_chance, label="chance", **CHANCE_LINE)
        _finish(panel, title, "share selected, easiest first")
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        panel.set_ylim(0, 1.02)
    axes[0].set_ylabel("Jaccard of the selections")
    return to_svg(figure, name="jaccard", description=f"Jaccard by fraction. {'; '.join(panels)}")


@STYLED
def learned_svg(found: Comparison) -> str | None:
    """Share of pairs and seeds whose margin is above delta at each evaluation, a panel a delta."""
    drawn = [each for each in found.sources if each.dynamics is not None and len(each.evaluations) > 1]
    if not drawn or drawn[0].dynamics is None:
        return None
    deltas = [learned.delta for learned in drawn[0].dynamics.learned]
    figure, axes = new_figure(3.4, columns=len(deltas), sharey=True)
    for place, (panel, delta) in enumerate(zip(axes, deltas, strict=True)):
        for color, source in zip(_cycled(len(drawn)), drawn, strict=True):
            if source.dynamics is not None:
                above = source.dynamics.learned[place].above
                _draw(panel, source.evaluations, above, color, source.name)
        _finish(panel, f"Margin above {delta:g}", "evaluation")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_ylim(0, 1)
    axes[0].set_ylabel("share of pairs and seeds")
    return to_svg(figure, name="learned", description="Share of pairs learned by evaluation")


def _draw(panel: Any, x: Sequence[float], y: Sequence[Estimate], color: str, name: str) -> None:
    low, high = ([getattr(each, end) for each in y] for end in ("low", "high"))
    panel.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    values = [each.value for each in y]
    panel.plot(x, values, color=color, marker="o", markersize=3, label=printable(name))


def _finish(panel: Any, title: str, label: str) -> None:
    panel.set_title(title)
    panel.set_xlabel(label)
    panel.grid(axis="y", color=FAINT)
    panel.legend(loc="best", fontsize=7.5, handlelength=1.6)


def _cycled(count: int) -> list[str]:
    return [_COLORS[place % len(_COLORS)] for place in range(count)]
