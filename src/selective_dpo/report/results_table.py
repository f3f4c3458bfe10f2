"""Several runs in one table for a paper, as Markdown or LaTeX, each number with half its 95% interval."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from selective_dpo.errors import ArtifactError
from selective_dpo.evaluation.benchmarks import model_name
from selective_dpo.evaluation.judgments import Judgments, judgments_from_json
from selective_dpo.evaluation.results import ArmResult, from_json
from selective_dpo.report.tables import number_with_interval, printable, share_with_interval
from selective_dpo.storage.artifacts import read_json

TITLES = {"alpaca-eval": "AlpacaEval 2", "arena-hard": "Arena-Hard", "mt-bench": "MT-Bench"}
_CONTROLLED = {"alpaca-eval": "AlpacaEval 2 (LC)", "arena-hard": "Arena-Hard (style control)"}


class ResultsTable(NamedTuple):
    """Rows of one width; the first two columns are names, the others numbers or empty."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def text(self, form: str) -> str:
        """As Markdown, or as LaTeX with booktabs' rules."""
        escape: Callable[[str], str] = _escape_latex if form == "latex" else _escape_markdown
        header, *rows = ([escape(printable(cell)) for cell in row] for row in (self.header, *self.rows))
        if form == "latex":
            lines = [f"{' & '.join(row)} \\\\" for row in (header, *rows)]
            begin = f"\\begin{{tabular}}{{ll{'r' * (len(header) - 2)}}}"
            return "\n".join([begin, "\\toprule", lines[0], "\\midrule", *lines[1:], "\\bottomrule", _END])
        rule = ["---", "---", *["---:"] * (len(header) - 2)]
        return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


_END = "\\end{tabular}"


def results_table(runs: Sequence[Path], judgments: Sequence[Path] = ()) -> ResultsTable:
    """All arms of these runs, with what benchmarks say of them; columns without a number are left out.

    `judgments` are files that `read-judgments --json` wrote. A judged model that is no run's has a row, too.

    Raises:
        ArtifactError: a run has no evaluation, two runs have one name, or a file is not in its format.
    """
    judged = [judgments_from_json(read_json(path)) for path in judgments]
    of_model: dict[str, dict[str, str]] = {}
    for found in judged:
        for model, numbers in _numbers_of(found).items():
            if twice := [name for name in numbers if name in of_model.get(model, {})]:
                raise ArtifactError(f"{twice[0]} of {model} stands in two of the judgments: leave one out")
            of_model.setdefault(model, {}).update(numbers)
    rows: list[tuple[str, str, dict[str, str]]] = []
    for folder in runs:
        name = str(read_json(folder / "config.json").get("name"))
        if any(name == run for run, *_ in rows):
            raise ArtifactError(f"two runs are called {name}: their models could not be told apart")
        arms = from_json(read_json(folder / "evaluation" / "results.json")).policies
        rows += [
            (name, arm.label, _numbers(arm) | of_model.pop(model_name(name, arm.name), {})) for arm in arms
        ]
    rows += [(model, "", numbers) for model, numbers in of_model.items()]
    names = list(dict.fromkeys(name for *_, numbers in rows for name in numbers))
    columns = [name for name in names if any(numbers.get(name) for *_, numbers in rows)]
    return ResultsTable(
        ("run", "trained on", *columns),
        tuple((run, arm, *(numbers.get(name, "") for name in columns)) for run, arm, numbers in rows),
    )


def _numbers(arm: ArmResult) -> dict[str, str]:
    return {
        "pairs": f"{arm.pairs:,}" if arm.pairs else "",
        "win rate": share_with_interval(arm.win_rate),
        "win rate at equal length": share_with_interval(arm.length_controlled),
        "characters": number_with_interval(arm.answer_characters, 0),
        "held-out accuracy": share_with_interval(arm.held_out.accuracy if arm.held_out else None),
    }


def _numbers_of(found: Judgments) -> Mapping[str, dict[str, str]]:
    of_value = number_with_interval if found.benchmark == "mt-bench" else share_with_interval
    numbers: dict[str, dict[str, str]] = {}
    for score in found.scores:
        part = f", {score.part}" if score.part else ""
        own = numbers.setdefault(score.model, {})
        if found.benchmark in _CONTROLLED:
            own[_CONTROLLED[found.benchmark] + part] = share_with_interval(score.controlled)
        own[TITLES[found.benchmark] + part] = of_value(score.score)
    return numbers


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\|*_`<\[])", r"\\\1", text).replace("\n", " ")


def _escape_latex(text: str) -> str:
    marks = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    marks |= {mark: f"\\{mark}" for mark in "&%$#_{}"}
    return re.sub(r"[\\~^±&%$#_{}]", lambda found: marks[found.group()], text).replace("\n", " ")
