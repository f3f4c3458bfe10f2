"""The report's figures. Each `*_svg` gives inline SVG text, or None where the run has nothing to draw."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from selective_dpo.criteria import CRITERIA
from selective_dpo.evaluation.results import REFERENCE, SELECTED, EvaluationResults, Measure, main_measure
from selective_dpo.report.content import CURVES, Curve, LengthCorrelation, ReportContent
from selective_dpo.report.study import arm_selections, sweep
from selective_dpo.report.tables import describe_chance, printable
from selective_dpo.stats.estimates import Estimate
from selective_dpo.stats.rank_correlation import binned_medians

# The hues are Okabe and Ito's, which people with any of the common color-vision deficiencies can tell apart.
BLUE = "#0072B2"
VERMILLION = "#D55E00"
GREY = "#C4C9D0"
INK = "#1F2933"
MUTED = "#5F6B7A"
FAINT = "#E4E7EB"
ARM_COLORS = ("#D55E00", "#009E73", "#CC79A7", "#B8860B", "#56B4E9", "#6B4C9A")
_LINE_STYLES = ("-", "--", "-.", ":")
CHANCE_LINE: dict[str, Any] = {"color": VERMILLION, "linestyle": (0, (4, 2))}
# The dark end of the greys is kept for the line of medians.
_LIGHT_GREYS = ListedColormap(matplotlib.colormaps["Greys"](np.linspace(0.12, 0.55, 32)))
# In steps: a smooth color bar would be drawn as an image, which the page's policy forbids.
_HEAT_MAP = matplotlib.colormaps["Blues"].resampled(10)

_WIDTH_INCHES = 7.6
_BINS = 48
_MAX_ANNOTATED_COLUMNS = 15
_MAX_DOTS = 1500
_MAX_CURVE_POINTS = 120
_MAX_LABEL = 44
# The few pairs beyond these quantiles would flatten everything else; they are counted, not hidden.
_SHOWN_QUANTILES = (0.002, 0.998)
_SVG = "{http://www.w3.org/2000/svg}"

_STYLE: dict[str, Any] = {
    "axes.edgecolor": MUTED,
    "axes.grid": False,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "text.color": INK,
    # A label is the user's text: a dollar sign in it is not mathematics.
    "text.parse_math": False,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 9,
}
# matplotlib's defaults and ours for as long as a figure is drawn, whatever the user's settings are.
STYLED = matplotlib.style.context(_STYLE, after_reset=True)


def new_figure(height_inches: float, columns: int = 1, **options: Any) -> tuple[Figure, list[Any]]:
    """A figure and its axes, from left to right; `options` go to matplotlib's `Figure.subplots`."""
    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **options)
    return figure, list(axes[0])


def arm_colors(names: Sequence[str]) -> dict[str, str]:
    """One color an arm, the same in each figure: blue for the run's own, grey for the starting model."""
    others = sorted(name for name in names if name not in (SELECTED, REFERENCE))
    colors = {name: ARM_COLORS[place % len(ARM_COLORS)] for place, name in enumerate(others)}
    return {**colors, SELECTED: BLUE, REFERENCE: MUTED}


def signed(value: float, decimals: int) -> str:
    """A difference with its sign, a true minus, and none at zero."""
    text = f"{value:+.{decimals}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def spearman_in_words(rho: Estimate) -> str:
    """A rank correlation with its 95% interval."""
    value, low, high = (signed(number, 2) for number in (rho.value, rho.low, rho.high))
    return f"Spearman {value} (95% {low} to {high})"


@STYLED
def difficulty_svg(content: ReportContent) -> str:
    """Histogram of the difficulty, the selected pairs apart from the others, and the loss at chance."""
    difficulty_P = content.curriculum.difficulty_P
    selected_P = np.asarray(content.curriculum.table["selected"])
    low, high = np.quantile(difficulty_P, _SHOWN_QUANTILES)
    edges = np.linspace(low, max(high, low + 1e-6), _BINS + 1)
    shown_P = np.clip(difficulty_P, edges[0], edges[-1])
    selected, _ = np.histogram(shown_P[selected_P], edges)
    others, _ = np.histogram(shown_P[~selected_P], edges)
    bar = {"width": np.diff(edges), "align": "edge", "edgecolor": "white", "linewidth": 0.4}
    figure, (axes,) = new_figure(3.3)
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
        name, _ = describe_chance(content.chance)
        title += f"; {float((difficulty_P > content.chance).mean()):.1%} lie above {name}"
        if edges[0] <= content.chance <= edges[-1]:
            axes.axvline(content.chance, label=f"{name} (chance)", linewidth=1.4, **CHANCE_LINE)
    axes.set_title(title)
    meaning = "as imported" if content.imported is not None else CRITERIA[content.select.aggregate].axis
    axes.set_xlabel(f"difficulty: {meaning}{content.unit if content.is_loss or content.imported else ''}")
    axes.set_ylabel("pairs")
    axes.margins(x=0.01)
    axes.set_ylim(0, 1.08 * max(selected + others))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.legend(loc="best", handlelength=1.4)
    return to_svg(figure, name="difficulty", description=f"Histogram: {axes.get_title(loc='left')}")


@STYLED
def agreement_svg(content: ReportContent) -> str | None:
    """Heat map of Spearman's correlation between the losses of all seeds and evaluations."""
    columns = content.agreement.get("columns") or []
    if len(columns) < 2:
        return None
    spearman = np.array(content.agreement["spearman"], dtype=np.float64)
    count = len(columns)
    apart = spearman[~np.eye(count, dtype=bool)]
    if not np.isfinite(apart).any():
        return None
    figure, (axes,) = new_figure(5.9)
    floor = min(math.floor(10 * float(np.nanmin(apart))) / 10, 0.9)
    mesh = axes.pcolormesh(spearman, cmap=_HEAT_MAP, vmin=floor, vmax=1.0, edgecolor="white", linewidth=0.6)
    if count <= _MAX_ANNOTATED_COLUMNS:
        for row, column in np.ndindex(count, count):
            value = spearman[row, column]
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
        name: dict[str, Any] = {"text": f"seed {columns[start]['seed']}", "color": MUTED, "ha": "center"}
        name |= {"textcoords": "offset points"}
        axes.annotate(xy=(centre, 0), xycoords=("data", "axes fraction"), xytext=(0, -24), **name)
        name |= {"va": "center", "rotation": 90}
        axes.annotate(xy=(0, centre), xycoords=("axes fraction", "data"), xytext=(-26, 0), **name)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.spines[:].set_visible(False)
    axes.set_title(
        f"Rank correlation between any two evaluations: {np.nanmin(apart):.2f} to {np.nanmax(apart):.2f}"
    )
    colors = figure.colorbar(mesh, ax=axes, shrink=0.6, aspect=25, pad=0.03)
    colors.outline.set_visible(False)
    colors.set_label("Spearman's rank correlation")
    return to_svg(figure, name="agreement", description=f"Heat map: {axes.get_title(loc='left')}")


@STYLED
def length_svg(content: ReportContent) -> str | None:
    """Difficulty against the pair's length, and against how much longer the chosen answer is."""
    if content.lengths is None:
        return None
    figure, (whole, difference) = new_figure(3.6, columns=2, sharey=True)
    for axes, correlation in zip((whole, difference), content.length_correlations, strict=True):
        _draw_length(axes, content, correlation)
    whole.set_ylabel(f"difficulty{content.unit}")
    titles = "; ".join(axes.get_title(loc="left") for axes in (whole, difference))
    return to_svg(figure, name="length", description=f"Difficulty against length. {titles}")


def _draw_length(axes: Any, content: ReportContent, correlation: LengthCorrelation) -> None:
    difficulty_P, length_P = content.curriculum.difficulty_P, correlation.tokens_P
    shown = np.ones(len(length_P), dtype=bool)
    for values_P in (length_P, difficulty_P):
        least, largest = np.quantile(values_P, _SHOWN_QUANTILES)
        shown &= (values_P >= least) & (values_P <= largest)
    if len(length_P) <= _MAX_DOTS:
        axes.scatter(length_P[shown], difficulty_P[shown], s=9, color=MUTED, alpha=0.35, linewidths=0)
    else:
        axes.hexbin(
            length_P[shown],
            difficulty_P[shown],
            gridsize=(34, 22),
            cmap=_LIGHT_GREYS,
            bins="log",
            mincnt=1,
            linewidths=0.1,
        )
    bins = binned_medians(length_P, difficulty_P)
    axes.fill_between(bins.centres, bins.lower, bins.upper, color=BLUE, alpha=0.18, linewidth=0)
    axes.plot(bins.centres, bins.median, color=BLUE, linewidth=1.8, marker="o", markersize=4)
    if content.chance is not None:
        axes.axhline(content.chance, linewidth=1.2, **CHANCE_LINE)
    axes.set_title(f"{correlation.name.capitalize()}\n{spearman_in_words(correlation.spearman)}")
    axes.set_xlabel(correlation.label)
    axes.grid(axis="y", color=FAINT)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}".replace("-", "\N{MINUS SIGN}"))


@STYLED
def arms_svg(content: ReportContent) -> str | None:
    """Each arm's win rate (else held-out accuracy), and its paired difference to the run's own policy."""
    results = content.results
    measure = main_measure(results) if results else None
    if results is None or measure is None:
        return None
    compared = [arm for arm in results.arms if arm.difference is not None and arm.name != SELECTED]
    options: dict[str, Any] = {"width_ratios": (1.25, 1)} if compared else {}
    figure, axes = new_figure(1.5 + 0.46 * len(measure.values), columns=1 + bool(compared), **options)
    _draw_arms(axes[0], results, measure)
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


def _draw_arms(axes: Any, results: EvaluationResults, measure: Measure) -> None:
    names = list(measure.values)
    axes.axvline(0.5, color=MUTED, linewidth=1)
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


@STYLED
def fractions_svg(content: ReportContent) -> str | None:
    """The arms' main measure by the share of the pairs, easiest first, beside random shares.

    Drawn where there are at least two shares of the easiest pairs; dashed: the win rate at equal length.
    """
    measure = main_measure(content.results) if content.results else None
    if measure is None or not content.config:
        return None
    shares = sweep(arm_selections(content.config))
    if len(shares["easiest"]) < 2:
        return None
    figure, (axes,) = new_figure(3.4)
    policies = content.results.policies if content.results else ()
    controlled = {arm.name: arm.length_controlled for arm in policies if arm.length_controlled}
    # A little apart, so that no interval hides the other.
    for (rule, arms), color, aside in zip(shares.items(), (BLUE, MUTED), (-0.003, 0.003), strict=True):
        for values, label, line in (
            (measure.values, rule, "-"),
            (controlled, f"{rule}, at equal length", "--"),
        ):
            drawn = {share: values[name] for share, name in arms.items() if name in values}
            if not drawn:
                continue
            aside += 0.002
            reach = np.array([(each.value - each.low, each.high - each.value) for each in drawn.values()]).T
            bars = {"yerr": np.nan_to_num(reach), "capsize": 3, "color": color, "marker": "o"}
            axes.errorbar(
                [share + aside for share in drawn],
                [each.value for each in drawn.values()],
                label=label,
                linestyle=line,
                **bars,
            )
    if measure.name == "win rate":
        axes.axhline(0.5, label="no change", linewidth=1.4, **CHANCE_LINE)
    axes.set_title(f"{measure.name.capitalize()} by share of the pairs")
    axes.set_xlabel("share trained on")
    axes.set_ylabel(f"{measure.name} (95%)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(axis="y", color=FAINT)
    axes.legend(loc="best", handlelength=1.6)
    return to_svg(figure, name="fractions", description=axes.get_title(loc="left"))


@STYLED
def training_svg(content: ReportContent) -> str | None:
    """Loss by step, and the difficulty of the pairs trained on by step, one line an arm.

    A curve of one point is not drawn; the page says it in a line.
    """
    panels = []
    for name, title in CURVES.items():
        label = f"difficulty{content.unit}" if name == "difficulty" else "loss"
        curves = {log.arm: getattr(log, name) for log in content.training_logs}
        if drawn := {arm: curve for arm, curve in curves.items() if len(curve.steps) > 1}:
            panels.append((title, label, drawn))
    if not panels:
        return None
    figure, axes = new_figure(3.4, columns=len(panels))
    colors = arm_colors([log.arm for log in content.training_logs])
    styles = {arm: _LINE_STYLES[place % len(_LINE_STYLES)] for place, arm in enumerate(colors)}
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


FIGURES: dict[str, Callable[[ReportContent], str | None]] = {
    "difficulty": difficulty_svg,
    "agreement": agreement_svg,
    "length": length_svg,
    "arms": arms_svg,
    "fractions": fractions_svg,
    "training": training_svg,
}


def _smoothed(curve: Curve) -> Curve:
    """Means of neighbouring entries, so that at most `_MAX_CURVE_POINTS` are drawn."""
    size = -(-len(curve.steps) // _MAX_CURVE_POINTS)
    starts = range(0, len(curve.steps), size)
    return Curve(
        tuple(curve.steps[start : start + size][-1] for start in starts),
        tuple(float(np.mean(curve.values[start : start + size])) for start in starts),
    )


def _shortened(text: str) -> str:
    clean = printable(text).replace("\n", " ")
    return clean if len(clean) <= _MAX_LABEL else f"{clean[: _MAX_LABEL - 1]}…"


def to_svg(figure: Figure, *, name: str, description: str) -> str:
    """The figure as an `<svg>` element to be put inside a page; equal figures give equal text.

    `name` starts every id in it, so several figures can share a page. Styles become attributes, for a
    content security policy that allows no inline style, and the page's style sheet sets the font.
    """
    sink = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        # A browser has fonts that matplotlib lacks: the text is drawn there, not here.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        figure.savefig(sink, format="svg", metadata={"Date": None}, transparent=True)
    root = ElementTree.fromstring(sink.getvalue())
    for child in list(root):
        # The RDF metadata, and a style sheet that would apply to the whole page.
        if child.tag == f"{_SVG}metadata" or child.find(f"{_SVG}style") is not None:
            root.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        element.attrib = _inlined(element.attrib, name)
    root.attrib = {
        "xmlns": "http://www.w3.org/2000/svg",
        "id": name,
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": printable(description),
        "stroke-linejoin": "round",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _inlined(attributes: dict[str, str], name: str) -> dict[str, str]:
    plain = {key.rpartition("}")[2]: value for key, value in attributes.items()}
    for declaration in plain.pop("style", "").split(";"):
        key, _, value = declaration.partition(":")
        if key.strip() and key.strip() != "font-family":
            plain[key.strip()] = value.strip()
    for key, value in plain.items():
        if key == "id":
            plain[key] = f"{name}-{value}"
        elif key == "href":
            plain[key] = value.replace("#", f"#{name}-", 1)
        else:
            plain[key] = value.replace("url(#", f"url(#{name}-")
    return plain
