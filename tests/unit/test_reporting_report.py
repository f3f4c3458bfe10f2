"""The page: complete in itself, everything escaped, and its sentences no stronger than the intervals."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from selective_dpo.report.content import Curve, DropCount, Lengths, ReportContent, load_report_content
from selective_dpo.report.page import headline, render_report, tiles, write_report
from selective_dpo.report.tables import LONGEST_SHOWN, preview, printable, turns
from selective_dpo.stats.estimates import Estimate
from tests.fixtures.run_folder import HOSTILE, make_run_folder


class Page(HTMLParser):
    """Tags with their attributes, and the text, of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_folder(tmp_path_factory.mktemp("report") / "run", pairs=60)


@pytest.fixture(scope="module")
def content(run_folder: Path) -> ReportContent:
    return load_report_content(run_folder)


@pytest.fixture(scope="module")
def html(content: ReportContent) -> str:
    return render_report(content)


def test_it_is_written_whole_and_equals_itself(run_folder: Path, html: str) -> None:
    path = write_report(run_folder)
    assert path == run_folder / "report.html"
    assert path.read_text("utf-8") == html
    assert not list(run_folder.glob(".partial-*"))


def test_it_loads_nothing_and_runs_nothing(html: str) -> None:
    page = Page(html)
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "pairs-data"}, {}]  # the browser of pairs
    names = {tag for tag, _ in page.tags}
    assert not names & {
        "img",
        "image",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "audio",
    }
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "style")]
        if "href" in attributes:
            assert tag == "use"
            assert str(attributes["href"]).startswith("#")
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttpRequest|eval\(|innerHTML", html)


def test_the_policy_allows_only_this_style_sheet(html: str) -> None:
    policy = next(
        str(attributes["content"])
        for tag, attributes in Page(html).tags
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    )
    (style,) = re.findall(r"<style>(.*?)</style>", html, flags=re.DOTALL)
    expected = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.split("; ")[:2] == ["default-src 'none'", f"style-src 'sha256-{expected}'"]
    assert html.index("Content-Security-Policy") < html.index("<style>")


def test_texts_of_the_data_are_text(html: str, content: ReportContent) -> None:
    assert HOSTILE not in html
    assert HOSTILE in Page(html).text
    assert "\ufffd no & <b>no</b>\ufffd" in Page(html).text
    mischief = "</style></title><script>1</script>"
    names = replace(
        content,
        title=mischief,
        subtitle=mischief,
        findings=(mischief,),
        provenance={mischief: {mischief: mischief}},
        config={"name": mischief},
        drops=(DropCount(mischief, mischief, 1),),
    )
    attacked = Page(render_report(names))
    assert [tag for tag, _ in attacked.tags].count("style") == 1
    assert [tag for tag, _ in attacked.tags].count("script") == 2  # the page's own


def test_every_section_is_there(html: str) -> None:
    ids = {str(attributes.get("id")) for tag, attributes in Page(html).tags if tag == "section"}
    assert ids >= {
        "headline", "arms", "difficulty", "agreement", "length",
        "training", "drops", "truth", "examples", "provenance",
    }  # fmt: skip
    assert {f"figure-{name}" for name in ("arms", "difficulty", "agreement", "length", "training")} <= {
        str(attributes.get("id")) for tag, attributes in Page(html).tags if tag == "figure"
    }
    assert "900 more characters are not shown." in html  # 2,400 - 1,500


def test_a_run_without_evaluation_says_so(content: ReportContent) -> None:
    bare = replace(content, results=None, training_logs=(), lengths=None, agreement={}, truth=(), findings=())
    text = Page(render_report(bare)).text
    for sentence in (
        "This run has not been evaluated yet.",
        "No evaluation is part of this run",
        "There is one seed",
        "The pairs of this run were not tokenized.",
        "No policy has been trained in this run yet.",
    ):
        assert sentence in text
    assert "What the deselected pairs are" not in text


def test_undefined_numbers_leave_no_trace(content: ReportContent) -> None:
    undefined = dict.fromkeys(("value", "standard_error", "low", "high"))
    seeds = [{"a": 41, "b": 42, "spearman": undefined, "overlap": undefined, "jaccard": undefined}]
    agreement = {"columns": [], "spearman": [], "seeds": seeds, "above_chance": undefined}
    text = Page(render_report(replace(content, agreement=agreement))).text
    assert not re.search(r"\bnan\b", text)
    assert [tile.name for tile in tiles(replace(content, agreement=agreement))] == [
        "Pairs kept",
        "Win rate",
    ]


def test_the_summary_names_the_strongest_correlate_of_difficulty(content: ReportContent) -> None:
    rank_P = np.argsort(np.argsort(content.curriculum.difficulty_P))
    nothing_P = np.zeros_like(rank_P)
    lengths = Lengths(prompt_P=2 * rank_P, chosen_P=nothing_P, rejected_P=rank_P)
    # The difference falls with every rank, and the pair grows with every rank but the one that is lowered.
    lengths.prompt_P[30] -= 60
    text = Page(render_report(replace(content, lengths=lengths))).text
    expected = (
        "difficulty follows the length of chosen over rejected most closely: Spearman −1.00 (95% −1.00 to"
    )
    assert expected in text
    none = replace(content, lengths=Lengths(nothing_P + 1, nothing_P + 1, nothing_P + 1))
    assert "most closely" not in " ".join(headline(none))


def test_a_training_curve_of_one_point_is_a_line_of_text(content: ReportContent) -> None:
    nothing = Curve((), ())
    log = content.training_logs[0]._replace(
        loss=Curve((10,), (0.69314,)), held_out_loss=nothing, difficulty=nothing
    )
    page = Page(render_report(replace(content, training_logs=(log,))))
    assert (
        "Logged once only, so not drawn as a curve: training loss of selected 0.6931 at step 10." in page.text
    )
    assert "No policy has been trained" not in page.text
    assert "figure-training" not in {attributes.get("id") for _, attributes in page.tags}


def sentences_with(content: ReportContent, difference: Estimate, win_rate: Estimate) -> str:
    assert content.results is not None
    arms = tuple(
        arm._replace(difference=difference) if arm.name == "all" else arm._replace(win_rate=win_rate)
        for arm in content.results.arms
        if arm.name in ("selected", "all")
    )
    return " ".join(headline(replace(content, results=content.results._replace(arms=arms))))


@pytest.mark.parametrize(
    ("low", "high", "of_the_difference", "of_the_win_rate"),
    [
        (0.01, 0.05, "is higher than that of “all pairs, shuffled”: +3.0 percentage points", "it is better"),
        (-0.05, -0.01, "is lower than that of “all pairs, shuffled”: -3.0 percentage points", "it is worse"),
        (-0.01, 0.05, "does not tell its win rate from that of “all pairs", "does not tell the two apart"),
        (float("nan"), float("nan"), "does not tell its win rate", "does not tell the two apart"),
    ],
)
def test_a_sentence_is_as_strong_as_its_interval(
    low: float, high: float, of_the_difference: str, of_the_win_rate: str, content: ReportContent
) -> None:
    middle = -0.03 if high < 0 else 0.03
    difference = Estimate(middle, 0.01, low, high)
    win_rate = Estimate(0.5 + middle, 0.01, 0.5 + low, 0.5 + high)
    text = sentences_with(content, difference, win_rate)
    assert of_the_difference in text
    assert of_the_win_rate in text


def test_long_and_odd_texts() -> None:
    assert turns("x" * (LONGEST_SHOWN + 3)) == (("", "x" * LONGEST_SHOWN, 3),)
    parts = [{"type": "text", "text": "hi"}]
    assert turns([{"role": "user", "content": parts}])[0].text == '[{"text":"hi","type":"text"}]'
    assert turns([{"role": "user", "content": None}])[0].text == "null"
    assert printable("a\tb\r\nc\x1b\x00\ud83d") == "a\tb\nc\ufffd\ufffd\ufffd"
    assert (
        preview([{"role": "system", "content": "s"}, {"role": "user", "content": "one\n two"}]) == "one two"
    )
    assert preview([]) == preview("") == ""
