"""Run the tests of the fault matrix and write docs/reliability.md from their outcome.

python tools/reliability.py            run them, two at a time, and write the page; exit code 1 if one failed
python tools/reliability.py --check    run nothing; exit code 1 if the page names other tests than there are,
                                       or an outcome other than "passed"

A test says with `@pytest.mark.fault(row=1)` which row it belongs to. Each of its parameters is a trial; with
`trials=30`, each is 30 of them.
"""

from __future__ import annotations

import ast
import platform
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"

FAULTS = {
    1: ("killed (SIGKILL) while scoring, training, publishing", "resumes, same remaining order, same result"),
    2: ("SIGTERM", "checkpoint, exit code 75, resumes"),
    3: ("killed while writing a checkpoint", "the partial one is passed over"),
    4: ("truncated or bit-flipped artifact, checkpoint, records", "named by digest; made again or refused"),
    5: ("disk full", "old artifact intact, one line, exit code not 0"),
    6: ("killed after the last step, before publishing", "only the publishing is repeated"),
    7: ("one of six scorers fails", "five kept, no curriculum without `--allow-partial`"),
    8: ("other number of processes on resume", "same order and numbers, or refused"),
    9: ("changed settings, model, tokenizer, template or data", "refused, field by field"),
    10: ("NaN or infinite loss of a pair, NaN gradient", "pair named, no update, no mean that skips it"),
    11: ("out of memory on the longest pair", "smaller batches, same update, logged"),
    12: ("two launches on one run, two ranks on one file", "a lock, one line; one writer"),
    13: ("curriculum with wrong ids, or for other data", "refused with counts and examples"),
    14: ("unusable pairs and rows", "dropped by reason or scored; counts add up; the row is named"),
    15: ("clock set back, folder moved, read-only folder", "digests decide; one line"),
    16: ("hub unreachable, push fails", "local result kept, push repeatable"),
}
HEAD = """\
# Reliability

Written by `python tools/reliability.py`, which runs the tests that it lists; do not edit. A fault is survived
if the repeated command finishes with the records, curriculum, order digest and policy of an undisturbed run
(bit for bit on a CPU), or if a typed error came before anything was spent. Trials count how often the fault
was really made: kills at seeded moments, damaged files, wrong inputs. "passed" means each of them.

"""


class Trial(NamedTuple):
    """One test of the matrix."""

    row: int
    trials: int
    test: str
    says: str
    """What the test's docstring says that it checks."""
    file_says: str
    """The first line of its file's."""


class Matrix:
    """Collects the matrix's tests, and how they end."""

    def __init__(self) -> None:
        self.trials: dict[str, list[Trial]] = defaultdict(list)
        self.outcomes: dict[str, str] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note the tests; those that other processes run are not collected here again."""
        for item in session.items:
            says = " ".join((item.function.__doc__ or "").split())
            file_says = (item.module.__doc__ or "").split("\n")[0]
            for mark in item.iter_markers("fault"):
                row, trials, test = (
                    mark.kwargs["row"],
                    mark.kwargs.get("trials", 1),
                    item.nodeid.split("[")[0],
                )
                self.trials[item.nodeid].append(Trial(row, trials, test, says, file_says))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The worst of a test's phases counts."""
        if report.failed or report.nodeid not in self.outcomes or report.skipped:
            self.outcomes[report.nodeid] = report.outcome

    def page(self) -> str:
        """The page, a section a row."""
        by_row: dict[int, dict[str, list[tuple[Trial, str]]]] = defaultdict(lambda: defaultdict(list))
        for node, trials in self.trials.items():
            for trial in trials:
                by_row[trial.row][trial.test].append((trial, self.outcomes.get(node, "not run")))
        lines = ["| # | fault | must | trials | outcome |", "| --- | --- | --- | --- | --- |"]
        for row, (fault, must) in FAULTS.items():
            found = [each for test in by_row[row].values() for each in test]
            trials = sum(trial.trials for trial, _ in found)
            lines.append(f"| {row} | {fault} | {must} | {trials} | {_outcome(found)} |")
        system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
        parts = [HEAD + f"Last written with {system}.\n", "\n".join(lines) + "\n"]
        for row, (fault, _) in FAULTS.items():
            parts.append(f"\n## {row}. {fault[0].upper()}{fault[1:]}")
            file = ""
            for test, found in sorted(by_row[row].items()):
                if test.split("::")[0] != file:
                    file = test.split("::")[0]
                    parts.append(f"\n{file}: {found[0][0].file_says}\n")
                trials = sum(trial.trials for trial, _ in found)
                says = f": {found[0][0].says}" if found[0][0].says else ""
                parts.append(f"- `{test}` ({trials}){says}")
        return "\n".join(parts) + "\n"


def marked_tests() -> set[str]:
    """Names of the tests that carry a row, as the source has them."""
    found = set()
    for path in sorted(ROOT.glob("tests/**/test_*.py")):
        for function in ast.walk(ast.parse(path.read_text("utf-8"))):
            marks = [ast.unparse(mark) for mark in getattr(function, "decorator_list", ())]
            if isinstance(function, ast.FunctionDef) and any(".mark.fault(" in mark for mark in marks):
                found.add(f"{path.relative_to(ROOT).as_posix()}::{function.name}")
    return found


def faults_of(page: str) -> list[str]:
    """What does not hold in the page's text."""
    named = set(re.findall(r"`(tests/\S+::\w+)`", page))
    found = [f"{test}: not as the page has it" for test in sorted(marked_tests() ^ named)]
    rows = re.findall(r"(?m)^\| (\d+) \|.*\| (\d+) \| ([^|]+) \|$", page)
    if [int(row) for row, _, _ in rows] != list(FAULTS):
        found.append(f"rows {', '.join(row for row, _, _ in rows)}: not one for each fault")
    return found + [f"row {row}: {outcome}" for row, _, outcome in rows if outcome != "passed"]


def main(arguments: list[str]) -> int:
    """Write or check the page; the exit code."""
    check = arguments == ["--check"]
    if arguments and not check:
        sys.stderr.write(__doc__ or "")
        return 2
    if check:
        wrong = faults_of(PAGE.read_text("utf-8"))
        sys.stderr.write("".join(f"{PAGE.name}: {line}\n" for line in wrong))
        return int(bool(wrong))
    matrix = Matrix()
    options = ["-q", "-p", "no:cacheprovider", "-m", "fault", str(ROOT / "tests")]
    code = int(pytest.main([*options, "--collect-only"], plugins=[matrix]))
    code = code or int(pytest.main([*options, "--numprocesses", "2"], plugins=[matrix]))
    if code:
        return 1
    PAGE.write_text(matrix.page(), "utf-8")
    return 0


def _outcome(found: list[tuple[Trial, str]]) -> str:
    outcomes = {outcome for _, outcome in found}
    if not outcomes:
        return "no test"
    return next(worst for worst in ("failed", "not run", "skipped", "passed") if worst in outcomes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
