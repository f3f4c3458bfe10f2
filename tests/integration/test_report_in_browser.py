"""The report in a real browser: figures are drawn, nothing is fetched, nothing in the data runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from selective_dpo.report.page import write_report
from tests.fixtures.run_folder import HOSTILE, make_run_folder

pytestmark = pytest.mark.browser

# For each figure: its box, how many marks have an extent, and whether its letters stay inside.
MEASURE = """
() => [...document.querySelectorAll('figure > .scroll > svg')].map(svg => {
  const box = svg.getBoundingClientRect();
  const drawn = element => { const b = element.getBoundingClientRect(); return b.width > 0 || b.height > 0; };
  const marks = [...svg.querySelectorAll('path, use, rect')].filter(
    element => !element.closest('defs') && drawn(element));
  const outside = [...svg.querySelectorAll('text')].filter(text => {
    const b = text.getBoundingClientRect();
    const across = b.left < box.left - 1 || b.right > box.right + 1;
    return across || b.top < box.top - 1 || b.bottom > box.bottom + 1;
  });
  return {
    id: svg.id, width: box.width, height: box.height, marks: marks.length,
    texts: svg.querySelectorAll('text').length, outside: outside.map(text => text.textContent),
  };
})
"""
FEWEST_MARKS = {"arms": 9, "difficulty": 40, "agreement": 225, "length": 300, "training": 12}
"""9 estimates; 48 bins, of which a few may be empty; 15 x 15 cells; most of 400 dots; 12 curves."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(make_run_folder(tmp_path_factory.mktemp("browser") / "run"))


class Opened:
    """A page and everything that it did while it was opened."""

    def __init__(self, browser: Any, report: Path, width: int = 1200) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.goto(report.as_uri(), wait_until="load")


def test_each_figure_is_drawn(browser: Any, report: Path) -> None:
    figures = {figure["id"]: figure for figure in Opened(browser, report).page.evaluate(MEASURE)}
    assert list(figures) == ["arms", "difficulty", "agreement", "length", "training"]
    for name, figure in figures.items():
        assert figure["width"] > 500, figure
        assert figure["height"] > 200, figure
        assert figure["marks"] >= FEWEST_MARKS[name], figure
        assert figure["texts"] >= 8, figure
        assert figure["outside"] == [], figure


def test_only_the_file_itself_is_requested(browser: Any, report: Path) -> None:
    opened = Opened(browser, report)
    opened.page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    opened.page.wait_for_timeout(200)
    assert opened.requests == [report.as_uri()]
    assert opened.complaints == []


def test_markup_in_a_pair_is_shown_and_does_not_run(browser: Any, report: Path) -> None:
    page = Opened(browser, report).page
    shown = page.locator("#examples pre").all_inner_texts()
    assert shown.count(HOSTILE) == 1
    assert page.title() == "qwen-small-alpaca · Selective DPO", "the script in the pair sets another title"
    assert page.locator("script, img").count() == 0
    assert page.locator("#examples pre").first.is_visible()


def test_scripts_could_not_run_even_if_escaping_failed(browser: Any, report: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(report.read_text("utf-8").replace("<footer>", f"{HOSTILE}<footer>"), "utf-8")
    opened = Opened(browser, broken)
    assert opened.page.locator("script").count() == 1, "the markup is really there"
    assert opened.page.title() == "qwen-small-alpaca · Selective DPO"
    assert any("Content Security Policy" in complaint for complaint in opened.complaints)


@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_is_no_wider_than_the_screen(browser: Any, report: Path, width: int) -> None:
    page = Opened(browser, report, width).page
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_run_without_evaluation_opens_too(browser: Any, tmp_path: Path) -> None:
    run_folder = make_run_folder(tmp_path / "bare", pairs=1600)
    for name in ("policy", "controls", "evaluation"):
        shutil.rmtree(run_folder / name)
    opened = Opened(browser, write_report(run_folder))
    figures = opened.page.evaluate(MEASURE)
    assert [figure["id"] for figure in figures] == ["difficulty", "agreement", "length"]
    assert all(figure["outside"] == [] and figure["marks"] > 40 for figure in figures)
    assert opened.complaints == []
