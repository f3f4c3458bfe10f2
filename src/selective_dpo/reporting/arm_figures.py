"""Figures of the arms: how each did, and how its training went."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from selective_dpo.core.estimates import Estimate
from selective_dpo.core.results import REFERENCE, SELECTED, EvaluationResults, Measure, main_measure
from selective_dpo.reporting.content import ReportContent
from selective_dpo.reporting.style import (
    FAINT,
    INK,
    LINE_STYLES,
    MUTED,
    arm_colors,
    new_figure,
    report_style,
    signed,
    to_svg,
)
from selective_dpo.reporting.text import printable
from selective_dpo.reporting.training_logs import Curve, TrainingLog

_CHANCE = 0.5
_MOST_RAW_POINTS = 120
_LONGEST_LABEL = 44


def arms_svg(content: ReportContent) -> str | None:
    """Each arm's win rate (else held-out accuracy), and its paired difference to the run's own policy."""
    results = content.results
    measure = main_measure(results) if results else None
    if results is None or measure is None:
        return None
    compared = [arm for arm in results.arms if arm.difference is not None and arm.name != SELECTED]
    with report_style():
        options: dict[str, Any] = {"width_ratios": (1.25, 1)} if compared else {}
        figure, axes = new_figure(1.5 + 0.46 * len(measure.values), columns=1 + bool(compared), **options)
        draw_arms(axes[0], results, measure)
        if compared:
            differences = {arm.name: arm.difference for arm in compared if arm.difference}
            axes[1].axvline(0.0, color=MUTED, linewidth=1)
            _draw_estimates(axes[1], differences, list(measure.values), lambda value: signed(100 * value, 1))
            axes[1].set_yticks([])
            axes[1].set_xlabel("difference (percentage points)")
            axes[1].set_title("Selected minus the arm")
            axes[1].xaxis.set_major_formatter(lambda value, _: signed(100 * value, 0))
        title = axes[0].get_title(loc="left")
        return to_svg(figure, name="arms", description=f"Dot plot with 95% intervals: {title}")


def draw_arms(axes: Any, results: EvaluationResults, measure: Measure) -> None:
    """Draw each arm's estimate with its 95% interval, one line an arm, beside what it was trained on."""
    names = list(measure.values)
    axes.axvline(_CHANCE, color=MUTED, linewidth=1)
    _draw_estimates(axes, measure.values, names, lambda value: f"{value:.1%}")
    axes.set_yticks([])
    for row, arm in enumerate(arm for arm in results.arms if arm.name in measure.values):
        own = arm.name == SELECTED
        place: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
        place |= {"xy": (0, row), "ha": "right", "va": "center"}
        weight = "bold" if own else "normal"
        axes.annotate(_shortened(arm.label), xytext=(-8, 5), weight=weight, color=INK, fontsize=9, **place)
        detail = "not trained further" if arm.name == REFERENCE else f"{arm.name} · {arm.pairs:,} pairs"
        axes.annotate(_shortened(detail), xytext=(-8, -6), color=MUTED, fontsize=8, **place)
    against = " against the starting model" if measure.name == "win rate" else ""
    axes.set_title(f"{measure.name.capitalize()}, 95% intervals")
    axes.set_xlabel(f"{measure.name}{against}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _draw_estimates(
    axes: Any, estimates: dict[str, Estimate], names: list[str], form: Callable[[float], str]
) -> None:
    colors = arm_colors(names)
    for row, name in enumerate(names):
        estimate = estimates.get(name)
        if estimate is None:
            continue
        reach = np.array([[estimate.value - estimate.low], [estimate.high - estimate.value]])
        marker = {"fmt": "o", "markersize": 7, "elinewidth": 2.2, "capsize": 0, "color": colors[name]}
        axes.errorbar(estimate.value, row, xerr=np.nan_to_num(reach), **marker)
        axes.annotate(
            form(estimate.value),
            (estimate.value, row),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=colors[name],
            # The number stays legible where it crosses a line.
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )
    axes.set_ylim(len(names) - 0.4, -0.7)
    axes.margins(x=0.12)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=FAINT)
    axes.set_axisbelow(True)
    axes.xaxis.get_major_locator().set_params(nbins=6)


def training_svg(content: ReportContent) -> str | None:
    """Loss by step, and the difficulty of the pairs trained on by step, one line an arm."""
    panels = [
        (title, label, curves)
        for title, label, curves in (
            ("Training loss", "loss", _curves(content, lambda log: log.loss)),
            ("Held-out loss", "loss", _curves(content, lambda log: log.held_out_loss)),
            (
                "Difficulty of the batch",
                f"difficulty{content.unit}",
                _curves(content, lambda log: log.difficulty),
            ),
        )
        if curves
    ]
    if not panels:
        return None
    with report_style():
        figure, axes = new_figure(3.4, columns=len(panels))
        colors = arm_colors([log.arm for log in content.training_logs])
        styles = {arm: LINE_STYLES[place % len(LINE_STYLES)] for place, arm in enumerate(colors)}
        lines = {}
        for panel, (title, label, curves) in zip(axes, panels, strict=True):
            for arm, curve in curves.items():
                smooth = _smoothed(curve)
                style = {"color": colors[arm], "linestyle": "-" if arm == SELECTED else styles[arm]}
                width = 2.2 if arm == SELECTED else 1.5
                (lines[arm],) = panel.plot(*smooth, linewidth=width, **style)
            panel.set_title(title)
            panel.set_xlabel("optimizer step")
            panel.set_ylabel(label)
            panel.grid(axis="y", color=FAINT)
        figure.legend(
            list(lines.values()),
            [printable(arm) for arm in lines],
            loc="outside lower center",
            ncols=min(len(lines), 4),
            handlelength=3,
        )
        titles = ", ".join(title for title, _, _ in panels)
        return to_svg(figure, name="training", description=f"Curves by optimizer step: {titles}")


def _curves(content: ReportContent, pick: Callable[[TrainingLog], Curve]) -> dict[str, Curve]:
    return {log.arm: pick(log) for log in content.training_logs if pick(log).steps}


def _smoothed(curve: Curve) -> Curve:
    """Means of neighbouring entries, so that at most `_MOST_RAW_POINTS` are drawn."""
    size = -(-len(curve.steps) // _MOST_RAW_POINTS)
    starts = range(0, len(curve.steps), size)
    return Curve(
        tuple(curve.steps[start : start + size][-1] for start in starts),
        tuple(float(np.mean(curve.values[start : start + size])) for start in starts),
    )


def _shortened(text: str) -> str:
    clean = printable(text).replace("\n", " ")
    return clean if len(clean) <= _LONGEST_LABEL else f"{clean[: _LONGEST_LABEL - 1]}…"
