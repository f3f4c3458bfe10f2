"""The report's figures. Each `*_svg` gives inline SVG text, or None where the run has nothing to draw."""

from __future__ import annotations

import math
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from selective_dpo.core.aggregation import CRITERIA
from selective_dpo.core.estimates import Estimate
from selective_dpo.curriculum.arrow_columns import codes
from selective_dpo.reporting.content import ReportContent
from selective_dpo.reporting.length import binned_medians, clustered_spearman
from selective_dpo.reporting.style import (
    BLUE,
    FAINT,
    GREY,
    INK,
    MUTED,
    VERMILLION,
    new_figure,
    report_style,
    signed,
    to_svg,
)
from selective_dpo.reporting.tables import chance_in_words

_BINS = 48
_MOST_ANNOTATED_COLUMNS = 15
_MOST_POINTS = 1500
# The few pairs beyond these quantiles would flatten everything else; they are counted, not hidden.
_SHOWN_QUANTILES = (0.002, 0.998)


def difficulty_svg(content: ReportContent) -> str:
    """Histogram of the difficulty, the selected pairs apart from the others, and the loss at chance."""
    with report_style():
        figure, (axes,) = new_figure(3.3)
        draw_difficulty(axes, content)
        return to_svg(figure, name="difficulty", description=f"Histogram: {axes.get_title(loc='left')}")


def draw_difficulty(axes: Any, content: ReportContent) -> None:
    """Draw the histogram of `difficulty_svg` on `axes`."""
    difficulty_P = content.curriculum.difficulty_P
    selected_P = np.asarray(content.curriculum.table["selected"])
    low, high = np.quantile(difficulty_P, _SHOWN_QUANTILES)
    edges = np.linspace(low, max(high, low + 1e-6), _BINS + 1)
    shown_P = np.clip(difficulty_P, edges[0], edges[-1])
    selected, _ = np.histogram(shown_P[selected_P], edges)
    others, _ = np.histogram(shown_P[~selected_P], edges)
    bar = {"width": np.diff(edges), "align": "edge", "edgecolor": "white", "linewidth": 0.4}
    axes.bar(edges[:-1], selected, color=BLUE, label=f"selected ({selected_P.sum():,})", **bar)
    axes.bar(
        edges[:-1],
        others,
        bottom=selected,
        color=GREY,
        label=f"not selected ({(~selected_P).sum():,})",
        **bar,
    )
    title = f"{selected_P.sum():,} of {len(difficulty_P):,} pairs selected"
    if content.chance is not None:
        name, _ = chance_in_words(content.chance)
        title += f"; {float((difficulty_P > content.chance).mean()):.1%} lie above {name}"
        if edges[0] <= content.chance <= edges[-1]:
            line = {"color": VERMILLION, "linestyle": (0, (4, 2)), "linewidth": 1.4}
            axes.axvline(content.chance, label=f"{name} (chance)", **line)
    axes.set_title(title)
    axes.set_xlabel(f"difficulty: {_meaning(content)}")
    axes.set_ylabel("pairs")
    axes.margins(x=0.01)
    axes.set_ylim(0, 1.08 * max(selected + others))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.legend(loc="best", handlelength=1.4)


def _meaning(content: ReportContent) -> str:
    if content.imported is not None:
        return f"as imported{content.unit}"
    unit = content.unit if content.is_loss else ""
    return CRITERIA[content.select.aggregate].axis + unit


def agreement_svg(content: ReportContent) -> str | None:
    """Heat map of Spearman's correlation between the losses of all seeds and evaluations."""
    columns = content.agreement.get("columns") or []
    if len(columns) < 2:
        return None
    spearman = np.array(content.agreement["spearman"], dtype=np.float64)
    if not np.isfinite(spearman[~np.eye(len(columns), dtype=bool)]).any():
        return None
    with report_style():
        figure, (axes,) = new_figure(5.9)
        _draw_agreement(figure, axes, columns, spearman)
        return to_svg(figure, name="agreement", description=f"Heat map: {axes.get_title(loc='left')}")


def _light_greys() -> Any:
    # The dark end is kept for the line of medians.
    return ListedColormap(matplotlib.colormaps["Greys"](np.linspace(0.12, 0.55, 32)))


def _heat_map() -> Any:
    # In steps: a smooth color bar would be drawn as an image, which the page's policy forbids.
    return matplotlib.colormaps["Blues"].resampled(10)


def _draw_agreement(figure: Figure, axes: Any, columns: list[dict[str, int]], spearman_CC: Any) -> None:
    count = len(columns)
    apart = spearman_CC[~np.eye(count, dtype=bool)]
    floor = min(math.floor(10 * float(np.nanmin(apart))) / 10, 0.9)
    mesh = axes.pcolormesh(
        spearman_CC, cmap=_heat_map(), vmin=floor, vmax=1.0, edgecolor="white", linewidth=0.6
    )
    if count <= _MOST_ANNOTATED_COLUMNS:
        for row, column in np.ndindex(count, count):
            value = spearman_CC[row, column]
            dark = value > floor + 0.55 * (1 - floor)
            size = 7.2 if count > 8 else 9
            text = f"{value:.2f}".replace("0.", ".", 1) if np.isfinite(value) else "–"
            place = {"ha": "center", "va": "center"}
            axes.text(column + 0.5, row + 0.5, text, color="white" if dark else INK, fontsize=size, **place)
    starts = [place for place in range(1, count) if columns[place]["seed"] != columns[place - 1]["seed"]]
    for start in starts:
        axes.axhline(start, color="white", linewidth=3)
        axes.axvline(start, color="white", linewidth=3)
    centres = [(low + high) / 2 for low, high in zip([0, *starts], [*starts, count], strict=True)]
    ticks, labels = np.arange(count) + 0.5, [str(column["evaluation"]) for column in columns]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, labels)
        axis.set_tick_params(length=0)
    for start, centre in zip([0, *starts], centres, strict=True):
        name = {"text": f"seed {columns[start]['seed']}", "textcoords": "offset points", "color": MUTED}
        axes.annotate(
            xy=(centre, 0), xycoords=("data", "axes fraction"), xytext=(0, -24), ha="center", **name
        )
        axes.annotate(
            xy=(0, centre),
            xycoords=("axes fraction", "data"),
            xytext=(-26, 0),
            va="center",
            rotation=90,
            ha="center",
            **name,
        )
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.spines[:].set_visible(False)
    axes.set_title(
        f"Rank correlation between any two evaluations: {np.nanmin(apart):.2f} to {np.nanmax(apart):.2f}"
    )
    colors = figure.colorbar(mesh, ax=axes, shrink=0.6, aspect=25, pad=0.03)
    colors.outline.set_visible(False)
    colors.set_label("Spearman's rank correlation")


def length_svg(content: ReportContent) -> str | None:
    """Difficulty against the pair's length, and against how much longer the chosen answer is."""
    if content.lengths is None:
        return None
    with report_style():
        figure, (whole, difference) = new_figure(3.6, columns=2, sharey=True)
        lengths = content.lengths
        _draw_length(whole, content, lengths.pair_P, "tokens of the pair", "Length of the pair")
        longer_P = lengths.chosen_P - lengths.rejected_P
        _draw_length(
            difference, content, longer_P, "chosen minus rejected (tokens)", "Length of chosen over rejected"
        )
        whole.set_ylabel(f"difficulty{content.unit}")
        titles = "; ".join(axes.get_title(loc="left") for axes in (whole, difference))
        return to_svg(figure, name="length", description=f"Difficulty against length. {titles}")


def _draw_length(axes: Any, content: ReportContent, length_P: Any, label: str, title: str) -> None:
    difficulty_P = content.curriculum.difficulty_P
    clusters_P, _ = codes(content.curriculum.table["prompt_id"])
    (left, right), (low, high) = (
        np.quantile(values, _SHOWN_QUANTILES) for values in (length_P, difficulty_P)
    )
    shown = (length_P >= left) & (length_P <= right) & (difficulty_P >= low) & (difficulty_P <= high)
    if len(length_P) <= _MOST_POINTS:
        axes.scatter(length_P[shown], difficulty_P[shown], s=9, color=MUTED, alpha=0.35, linewidths=0)
    else:
        axes.hexbin(
            length_P[shown],
            difficulty_P[shown],
            gridsize=(34, 22),
            cmap=_light_greys(),
            bins="log",
            mincnt=1,
            linewidths=0.1,
        )
    bins = binned_medians(length_P, difficulty_P)
    axes.fill_between(bins.centres, bins.lower, bins.upper, color=BLUE, alpha=0.18, linewidth=0)
    axes.plot(bins.centres, bins.median, color=BLUE, linewidth=1.8, marker="o", markersize=4)
    if content.chance is not None:
        axes.axhline(content.chance, color=VERMILLION, linestyle=(0, (4, 2)), linewidth=1.2)
    rho = clustered_spearman(length_P, difficulty_P, clusters_P)
    axes.set_title(f"{title}\n{_in_words(rho)}")
    axes.set_xlabel(label)
    axes.grid(axis="y", color=FAINT)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}".replace("-", "\N{MINUS SIGN}"))


def _in_words(rho: Estimate) -> str:
    value, low, high = (signed(number, 2) for number in (rho.value, rho.low, rho.high))
    return f"Spearman {value} (95% {low} to {high})"
