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
    assert page.locator("script:not(body > script), img").count() == 0
    assert page.locator("#examples pre").first.is_visible()


def test_scripts_could_not_run_even_if_escaping_failed(browser: Any, report: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(report.read_text("utf-8").replace("<footer>", f"{HOSTILE}<footer>"), "utf-8")
    opened = Opened(browser, broken)
    assert opened.page.locator("script").count() == 3, "the markup is really there, beside the page's own two"
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


# --- the browser of pairs ----------------------------------------------------------------------------------


def shown(page: Any, column: int = 1) -> list[str]:
    return page.locator(f"table.pairs tbody tr td:nth-child({column})").all_inner_texts()


def count_of(page: Any) -> int:
    return int(page.locator("#browser [role=status]").inner_text().split()[0].replace(",", ""))


@pytest.fixture
def page(browser: Any, report: Path) -> Any:
    opened = Opened(browser, report)
    opened.page.wait_for_selector("table.pairs tbody tr")
    yield opened.page
    assert opened.complaints == [] and opened.requests == [report.as_uri()]
    opened.page.close()


def test_pairs_are_sorted_by_any_column_and_more_are_shown_on_demand(page: Any) -> None:
    assert count_of(page) == 400 and len(shown(page)) == 100
    up = [float(value) for value in shown(page)]
    assert up == sorted(up)
    page.locator("#sort-difficulty button").click()
    down = [float(value) for value in shown(page)]
    assert down == sorted(down, reverse=True) and down[0] > up[-1]
    assert page.locator("#sort-difficulty").get_attribute("aria-sort") == "descending"
    page.locator("#sort-chosen_tokens button").click()
    place = page.locator("table.pairs th").all_inner_texts().index("Chosen") + 1
    tokens = [int(value) for value in shown(page, place)]
    assert tokens == sorted(tokens)
    page.get_by_role("button", name="Show more").click()
    assert len(shown(page)) == 200


def test_words_selection_and_the_histogram_filter(page: Any) -> None:
    everything = shown(page, 2)
    word = everything[0].split()[0].lower()
    page.fill("#pair-search", word)
    assert 0 < count_of(page) <= 400
    page.get_by_role("button", name="Clear").click()
    assert count_of(page) == 400
    page.select_option("#pair-selected", label="yes")
    selected = count_of(page)
    page.select_option("#pair-selected", label="no")
    assert selected + count_of(page) == 400 and 0 < selected < 400
    page.get_by_role("button", name="Clear").click()
    # A bar in the middle: what it says is what is found, and all of it lies within its ends.
    bar = page.locator(".bars g").nth(20)
    said = int(bar.get_attribute("aria-label").split(": ")[1].split()[0])
    bar.focus()
    page.keyboard.press("Enter")
    assert count_of(page) == pytest.approx(said, abs=1)  # its ends are written with four decimals
    low, high = (float(page.input_value(f"#pair-{end}")) for end in ("low", "high"))
    assert all(low <= float(value) <= high for value in shown(page))


def test_a_pair_opens_with_its_differences_marked_and_has_an_address(page: Any, report: Path) -> None:
    first = page.locator("td.start button").first
    first.focus()
    page.keyboard.press("ArrowDown")
    pair = page.evaluate("document.activeElement.dataset.pair")
    assert pair != first.get_attribute("data-pair")
    page.keyboard.press("Enter")
    assert page.locator("dialog h3").inner_text() == f"Pair {pair}"
    assert page.evaluate("location.hash") == f"#pair={pair}"
    assert page.locator("dialog .answers pre").count() >= 2
    assert page.locator("dialog mark").count() > 0
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0 and page.evaluate("location.hash") == ""
    assert page.evaluate("document.activeElement.dataset.pair") == pair
    page.evaluate(f"location.hash = '#pair={pair}'")
    page.wait_for_selector("dialog[open]")
    assert page.locator("dialog h3").inner_text() == f"Pair {pair}"


def test_hostile_texts_stay_text_in_the_browser_of_pairs(page: Any) -> None:
    page.fill("#pair-search", "script")
    assert count_of(page) >= 1
    page.locator("td.start button").first.click()
    texts = page.locator("dialog pre").all_inner_texts()
    assert any("<script" in text for text in texts)
    assert page.locator("dialog script").count() == 0 and page.locator("dialog img").count() == 0
    assert page.title() == "qwen-small-alpaca · Selective DPO"


@pytest.mark.parametrize("width", [380, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_narrow_and_dark_screens(browser: Any, report: Path, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.goto(report.as_uri())
    page.wait_for_selector("table.pairs tbody tr")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    page.locator("td.start button").first.click()
    box = page.locator("dialog").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width
    page.close()


def test_without_scripts_the_report_is_there_and_the_browser_is_not(browser: Any, report: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert not page.locator("#browser").is_visible()
    assert page.locator("#examples details").count() > 5
    context.close()
