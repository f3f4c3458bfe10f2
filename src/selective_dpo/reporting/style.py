"""How figures look, and how one becomes SVG that can stand inside a page.

The hues are Okabe and Ito's, which people with any of the common color-vision deficiencies can tell apart.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

from selective_dpo.core.results import REFERENCE, SELECTED
from selective_dpo.reporting.text import printable

BLUE = "#0072B2"
VERMILLION = "#D55E00"
GREY = "#C4C9D0"
INK = "#1F2933"
MUTED = "#5F6B7A"
FAINT = "#E4E7EB"
_ARM_COLORS = ("#D55E00", "#009E73", "#CC79A7", "#B8860B", "#56B4E9", "#6B4C9A")
LINE_STYLES = ("-", "--", "-.", ":")
WIDTH_INCHES = 7.6
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


@contextlib.contextmanager
def report_style() -> Iterator[None]:
    """matplotlib's defaults and ours for as long as this is open, whatever the user's settings are."""
    defaults = {
        name: value for name, value in matplotlib.rcParamsDefault.items() if not name.startswith("backend")
    }
    letters = {"svg.fonttype": "none", "svg.hashsalt": "selective-dpo"}
    with matplotlib.rc_context({**defaults, **_STYLE, **letters}):
        yield


def new_figure(height_inches: float, columns: int = 1, **options: Any) -> tuple[Figure, list[Any]]:
    """A figure and its axes, from left to right; `options` go to matplotlib's `Figure.subplots`."""
    figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **options)
    return figure, list(axes[0])


def arm_colors(names: Sequence[str]) -> dict[str, str]:
    """One color an arm, the same in each figure: blue for the run's own, grey for the starting model."""
    others = sorted(name for name in names if name not in (SELECTED, REFERENCE))
    colors = {name: _ARM_COLORS[place % len(_ARM_COLORS)] for place, name in enumerate(others)}
    return {**colors, SELECTED: BLUE, REFERENCE: MUTED}


def signed(value: float, decimals: int) -> str:
    """A difference with its sign, a true minus, and none at zero."""
    text = f"{value:+.{decimals}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


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
