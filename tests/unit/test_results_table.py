"""Several runs in one table: names are escaped, judged models meet their arms, empty columns are left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from selective_dpo.cli import main
from selective_dpo.errors import ArtifactError
from selective_dpo.evaluation.judgments import Judgments, Score, judgments_from_json
from selective_dpo.evaluation.results import ArmResult, EvaluationResults, to_json
from selective_dpo.report.results_table import results_table
from selective_dpo.stats.estimates import Estimate


def estimate(value: float, half: float) -> Estimate:
    return Estimate(value, half / 1.96, value - half, value + half)


def run_folder(folder: Path, name: str) -> Path:
    folder.joinpath("evaluation").mkdir(parents=True)
    folder.joinpath("config.json").write_text(json.dumps({"name": name}), "utf-8")
    arms = (
        ArmResult("reference", "starting model", 0, 0, win_rate=estimate(0.5, 0.02)),
        ArmResult("selected", "easiest 50%, a_b|c", 1200, 30, win_rate=estimate(0.56, 0.014)),
    )
    results = to_json(EvaluationResults("a judge", 5, 1, arms))
    folder.joinpath("evaluation/results.json").write_text(json.dumps(results), "utf-8")
    return folder


def judgments(benchmark: Any, *scores: Score) -> Judgments:
    return Judgments(benchmark, scores, "b", "gpt-4", "length", {"f": "00"}, ("2 judgments",))


def test_runs_and_judgments_come_together(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / "one", "llama"), run_folder(tmp_path / "two", "qwen")]
    grades = judgments(
        "mt-bench",
        Score("qwen-selected", "", 80, estimate(7.5, 0.3), None, turns=(estimate(7.7, 0.4),)),
        Score("gpt", "", 80, estimate(9.0, 0.2), estimate(-1.5, 0.3)),
    )
    alpaca = judgments(
        "alpaca-eval", Score("llama-selected", "", 805, estimate(0.3, 0.02), None, estimate(0.35, 0.02))
    )
    files = []
    for found in (grades, alpaca):
        assert judgments_from_json(json.loads(json.dumps(found.as_json()))) == found
        files.append(tmp_path / f"{found.benchmark}.json")
        files[-1].write_text(json.dumps(found.as_json()), "utf-8")
    table = results_table(runs, files)
    assert table.header == (
        *("run", "trained on", "pairs", "win rate", "AlpacaEval 2 (LC)", "AlpacaEval 2", "MT-Bench"),
    )
    assert table.rows == (
        ("llama", "starting model", "", "50.0% ± 2.0", "", "", ""),
        ("llama", "easiest 50%, a_b|c", "1,200", "56.0% ± 1.4", "35.0% ± 2.0", "30.0% ± 2.0", ""),
        ("qwen", "starting model", "", "50.0% ± 2.0", "", "", ""),
        ("qwen", "easiest 50%, a_b|c", "1,200", "56.0% ± 1.4", "", "", "7.50 ± 0.30"),
        ("gpt", "", "", "", "", "", "9.00 ± 0.20"),
    )
    with pytest.raises(ArtifactError, match="stands in two of the judgments"):
        results_table(runs, [*files, files[0]])
    with pytest.raises(ArtifactError, match="two runs are called llama"):
        results_table([runs[0], runs[0]])
    files[0].write_text('{"scores": [], "notes": []}', "utf-8")
    with pytest.raises(ArtifactError, match="not what `read-judgments --json` writes"):
        results_table(runs, files)


def test_the_command_writes_markdown_or_latex(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(run_folder(tmp_path / "one", "llama"))
    assert main(["table", run]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| run | trained on | pairs | win rate |",
        "| --- | --- | ---: | ---: |",
        "| llama | starting model |  | 50.0% ± 2.0 |",
        r"| llama | easiest 50%, a\_b\|c | 1,200 | 56.0% ± 1.4 |",
    ]
    assert main(["table", run, "--format", "latex"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        r"\begin{tabular}{llrr}",
        r"\toprule",
        r"run & trained on & pairs & win rate \\",
        r"\midrule",
        r"llama & starting model &  & 50.0\% $\pm$ 2.0 \\",
        r"llama & easiest 50\%, a\_b|c & 1,200 & 56.0\% $\pm$ 1.4 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    assert main(["table", str(tmp_path / "nowhere")]) == 2
