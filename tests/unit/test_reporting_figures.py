"""Figures are self-contained SVG: safe inside a page, deterministic, and drawn from the measured numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from selective_dpo.config import SelectConfig
from selective_dpo.report.content import ReportContent, load_report_content
from selective_dpo.report.figures import (
    _draw_estimates,
    agreement_svg,
    arms_svg,
    difficulty_svg,
    fractions_svg,
    length_svg,
    new_figure,
    signed,
    training_svg,
)
from selective_dpo.stats.estimates import Estimate
from tests.fixtures.run_folder import make_run_folder

Draw = Callable[[ReportContent], str | None]
FIGURES: tuple[Draw, ...] = (difficulty_svg, agreement_svg, length_svg, arms_svg, training_svg)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> ReportContent:
    return load_report_content(make_run_folder(tmp_path_factory.mktemp("figures") / "run", pairs=60))


def svg_of(draw: Draw, content: ReportContent) -> str:
    svg = draw(content)
    assert svg is not None
    return svg


def attributes(svg: str) -> list[tuple[str, str]]:
    return [item for element in ElementTree.fromstring(svg).iter() for item in element.attrib.items()]


@pytest.fixture(scope="module")
def drawn(content: ReportContent) -> dict[Draw, str]:
    return {draw: svg_of(draw, content) for draw in FIGURES}


@pytest.mark.parametrize("draw", FIGURES)
def test_a_figure_needs_nothing_and_equals_itself(
    draw: Draw, content: ReportContent, drawn: dict[Draw, str]
) -> None:
    svg = drawn[draw]
    assert svg == draw(content)
    assert svg.startswith("<svg ")
    root = ElementTree.fromstring(svg)
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert tags <= {"svg", "g", "defs", "path", "use", "clipPath", "rect", "text"}, "no image, style, script"
    assert root.attrib["aria-label"]
    named = attributes(svg)
    assert not [name for name, _ in named if name == "style" or name.startswith("on")]
    ids = {value for name, value in named if name == "id"}
    references = {value.removeprefix("#") for name, value in named if name == "href"}
    references |= {value[5:-1] for name, value in named if value.startswith("url(#")}
    assert references <= ids


def test_figures_share_no_id(drawn: dict[Draw, str]) -> None:
    ids = [value for svg in drawn.values() for name, value in attributes(svg) if name == "id"]
    assert len(ids) == len(set(ids))


def test_the_histogram_says_what_was_selected(content: ReportContent, drawn: dict[Draw, str]) -> None:
    above = (content.curriculum.difficulty_P > 0.6931471805599453).mean()
    assert f"30 of 60 pairs selected; {above:.1%} lie above ln 2" in drawn[difficulty_svg]


def test_the_arms_show_value_and_label(drawn: dict[Draw, str]) -> None:
    svg = drawn[arms_svg]
    for text in ("56.1%", "38.9%", "easiest 50%, easy to hard", "hardest · 30 pairs", "+17.2", "+2.8"):
        assert text in svg


def test_the_sweep_over_shares_has_a_line_at_equal_length(content: ReportContent) -> None:
    assert content.results is not None
    config = {"select": {}, "evaluate": {"controls": {"all": {"rule": "all"}}}}
    swept = replace(content, config=config)
    plain = svg_of(fractions_svg, swept)
    assert "easiest" in plain
    assert "at equal length" not in plain
    rate = Estimate(0.5, 0.1, 0.4, 0.6)
    arms = tuple(arm._replace(length_controlled=rate) for arm in content.results.arms)
    controlled = replace(swept, results=content.results._replace(arms=arms))
    assert "easiest, at equal length" in svg_of(fractions_svg, controlled)


def test_an_interval_is_drawn_from_end_to_end() -> None:
    _, (axes,) = new_figure(2.0)
    lopsided, none = Estimate(0.98, 0.01, 0.83, 1.0), Estimate(0.5, math.nan, math.nan, math.nan)
    _draw_estimates(axes, {"selected": lopsided, "all": none}, ["selected", "all"], str)
    (first,), (second,) = (bars.lines[2] for bars in axes.containers)
    np.testing.assert_allclose(first.get_segments()[0][:, 0], [0.83, 1.0])
    np.testing.assert_allclose(second.get_segments()[0][:, 0], [0.5, 0.5])


def test_hostile_names_are_text(content: ReportContent) -> None:
    assert content.results is not None
    hostile = '<img src=x onerror="1"> $x_1$ & \x00\ud800 漢字'
    arms = tuple(arm._replace(label=hostile) for arm in content.results.arms)
    svg = svg_of(arms_svg, replace(content, results=content.results._replace(arms=arms)))
    texts = [element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")]
    assert texts.count('<img src=x onerror="1"> $x_1$ & \ufffd\ufffd 漢字') == len(arms)


def test_without_differences_there_is_one_panel(content: ReportContent) -> None:
    assert content.results is not None
    arms = tuple(arm._replace(difference=None) for arm in content.results.arms)
    alone = replace(content, results=content.results._replace(arms=arms))
    assert "Selected minus" not in svg_of(arms_svg, alone)


def test_without_win_rates_held_out_accuracy_is_drawn(content: ReportContent) -> None:
    assert content.results is not None
    arms = tuple(arm._replace(win_rate=None, difference=None) for arm in content.results.arms)
    svg = svg_of(arms_svg, replace(content, results=content.results._replace(arms=arms)))
    # 0.55 + 0.5 (0.561 - 0.4) = 0.6305
    assert "Held-out accuracy, 95% intervals" in svg
    assert "63.0%" in svg or "63.1%" in svg


def test_what_a_run_lacks_is_not_drawn(content: ReportContent) -> None:
    bare = replace(content, results=None, training_logs=(), lengths=None, agreement={})
    assert [draw(bare) for draw in FIGURES[1:]] == [None] * 4
    assert difficulty_svg(bare)


def test_ranks_are_not_called_losses(content: ReportContent) -> None:
    ranked = replace(content, select=SelectConfig(aggregate="rank-mean"))
    for draw in (difficulty_svg, length_svg):
        svg = svg_of(draw, ranked)
        assert "ln 2" not in svg
        assert "nats" not in svg


def test_another_loss_has_its_own_chance_and_no_nats(content: ReportContent) -> None:
    hinge = replace(content, agreement={**content.agreement, "chance_loss": 0.5})
    above = (content.curriculum.difficulty_P > 0.5).mean()
    assert f"{above:.1%} lie above 0.5" in svg_of(difficulty_svg, hinge)
    for draw in (length_svg, training_svg):
        svg = svg_of(draw, hinge)
        assert "ln 2" not in svg and "nats" not in svg
    unknown = svg_of(difficulty_svg, replace(content, agreement={**content.agreement, "chance_loss": None}))
    assert not [text for text in ("ln 2", "nats", "lie above") if text in unknown]


def test_undefined_agreement_is_not_drawn(content: ReportContent) -> None:
    # What one prompt gives: every correlation is null.
    nothing = [[None if a != b else 1.0 for a in range(15)] for b in range(15)]
    assert agreement_svg(replace(content, agreement={**content.agreement, "spearman": nothing})) is None
    partly = [
        [0.5 if {a, b} == {0, 1} else value for a, value in enumerate(row)] for b, row in enumerate(nothing)
    ]
    svg = svg_of(agreement_svg, replace(content, agreement={**content.agreement, "spearman": partly}))
    assert "0.50 to 0.50" in svg


def test_the_users_matplotlib_settings_change_nothing(content: ReportContent, drawn: dict[Draw, str]) -> None:
    with matplotlib.rc_context({"axes.grid": True, "font.size": 30, "svg.fonttype": "path"}):
        assert difficulty_svg(content) == drawn[difficulty_svg]
        assert matplotlib.rcParams["font.size"] == 30


def test_signed_numbers() -> None:
    assert [signed(value, 1) for value in (2.84, -0.5, 0.0, -0.04)] == ["+2.8", "−0.5", "0.0", "0.0"]
