"""Run the tests of the fault matrix, print them row by row, and write the table of docs/reliability.md.

python tools/reliability.py            run them, two at a time; exit code 1 if one failed
python tools/reliability.py --list     run nothing; print the tests of each row
python tools/reliability.py --check    run nothing; exit code 1 if a row has no test or did not pass

A test says with `@pytest.mark.fault(row=1)` which row it belongs to. Each of its parameters is a trial; with
`trials=10`, each is 10 of them.
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

Written by `python tools/reliability.py`, which runs the tests of each row and prints their names; do not edit
(`--list` prints them and runs nothing). A fault is survived if the repeated command finishes with the
records, curriculum, order digest and policy of an undisturbed run (bit for bit on a CPU), or if a typed error
came before anything was spent. Trials count how often the fault was really made: kills at seeded moments,
damaged files, wrong inputs. "passed" means each of them.

"""


class Trial(NamedTuple):
    """One case of a test of the matrix."""

    row: int
    trials: int
    node: str
    says: str
    """The first sentence of the test's docstring."""


class Matrix:
    """Collects the matrix's tests, and how they end."""

    def __init__(self) -> None:
        self.trials: list[Trial] = []
        self.outcomes: dict[str, str] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note the tests; those that other processes run are not collected here again."""
        for item in session.items:
            says = " ".join((item.function.__doc__ or "").split()).split(". ")
            says = says[1] if says[0].startswith("Row ") and len(says) > 1 else says[0]
            for mark in item.iter_markers("fault"):
                trials = mark.kwargs.get("trials", 1)
                self.trials.append(Trial(mark.kwargs["row"], trials, item.nodeid, says))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The worst of a test's phases counts."""
        if report.failed or report.nodeid not in self.outcomes or report.skipped:
            self.outcomes[report.nodeid] = report.outcome

    def table(self) -> str:
        """The page: one line a row."""
        lines = ["| # | fault | must | trials | outcome |", "| --- | --- | --- | --- | --- |"]
        for row, (fault, must) in FAULTS.items():
            found = [trial for trial in self.trials if trial.row == row]
            outcomes = {self.outcomes.get(trial.node, "not run") for trial in found} or {"no test"}
            outcome = next(
                worst for worst in ("failed", "not run", "skipped", "passed", "no test") if worst in outcomes
            )
            trials = sum(trial.trials for trial in found)
            lines.append(f"| {row} | {fault} | {must} | {trials} | {outcome} |")
        system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
        return f"{HEAD}Last written with {system}.\n\n" + "\n".join(lines) + "\n"

    def listing(self) -> str:
        """The tests of each row, each with its number of trials and what it checks."""
        lines = []
        for row, (fault, _) in FAULTS.items():
            lines.append(f"\n{row}. {fault}")
            by_test: dict[str, list[Trial]] = defaultdict(list)
            for trial in self.trials:
                if trial.row == row:
                    by_test[trial.node.split("[")[0]].append(trial)
            for test, found in sorted(by_test.items()):
                lines.append(
                    f"  {test} ({sum(trial.trials for trial in found)}): {found[0].says}".rstrip(": ")
                )
        return "\n".join(lines) + "\n"


def marked_rows() -> set[int]:
    """The rows that a test in the source is marked with."""
    found = set()
    for path in sorted(ROOT.glob("tests/**/test_*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
                found |= {each.value.value for each in node.keywords if each.arg == "row"}
    return found


def wrong_rows(page: str) -> list[str]:
    """What does not hold in the page's table."""
    rows = re.findall(r"(?m)^\| (\d+) \|.*\| (\d+) \| ([^|]+) \|$", page)
    found = []
    if [int(row) for row, _, _ in rows] != list(FAULTS):
        found.append(f"rows {', '.join(row for row, _, _ in rows)}: not one for each fault")
    found += [f"row {row}: no test is marked with it" for row in sorted(set(FAULTS) - marked_rows())]
    return found + [f"row {row}: {outcome}" for row, _, outcome in rows if outcome != "passed"]


def main(arguments: list[str]) -> int:
    """Run, list or check; the exit code."""
    if arguments not in ([], ["--list"], ["--check"]):
        sys.stderr.write(__doc__ or "")
        return 2
    if arguments == ["--check"]:
        wrong = wrong_rows(PAGE.read_text("utf-8"))
        sys.stderr.write("".join(f"{PAGE.name}: {line}\n" for line in wrong))
        return int(bool(wrong))
    matrix = Matrix()
    options = ["-q", "-p", "no:cacheprovider", "-m", "fault", str(ROOT / "tests")]
    code = int(pytest.main([*options, "--collect-only", "-qq"], plugins=[matrix]))
    if not code and not arguments:
        code = int(pytest.main([*options, "--numprocesses", "2", "--dist", "worksteal"], plugins=[matrix]))
        PAGE.write_text(matrix.table(), "utf-8")
    sys.stdout.write(matrix.listing())
    return int(bool(code))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
