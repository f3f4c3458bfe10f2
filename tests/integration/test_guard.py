"""`evaluate.guard`: two small tasks, made here, run by lm-evaluation-harness on every arm."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from selective_dpo.cli import main
from selective_dpo.storage.artifacts import read_json
from tests.fixtures.models import recipe_file, tiny_pairs_file, tiny_recipe

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""
CHOICES = 'doc_to_choice: "{{choices}}"\n'
GENERATION = 'generation_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 3\n  do_sample: false\n'


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guard")
    tasks = folder / "tasks"
    tasks.mkdir()
    questions = {
        "choose": [{"question": f"{i} is", "choices": ["+", "-"], "answer": i % 2} for i in range(10)],
        "say": [{"question": f"say {i}", "answer": str(i)} for i in range(4)],
    }
    for name, rows in questions.items():
        (tasks / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        is_choice = name == "choose"
        text = TASK.format(
            name=name,
            file=tasks / f"{name}.jsonl",
            kind="multiple_choice" if is_choice else "generate_until",
            more=CHOICES if is_choice else GENERATION,
            metric="acc" if is_choice else "exact_match",
        )
        (tasks / f"{name}.yaml").write_text(text)
    tiny_pairs_file(folder / "test.jsonl", 8, seed=3)
    made = tiny_recipe(
        folder,
        score={"evaluations": 1},
        data={
            "train": [{"path": str(tiny_pairs_file(folder / "pairs.jsonl", 16))}],
            "test": [{"path": str(folder / "test.jsonl")}],
            "max_length": 64,
            "max_prompt_length": 32,
        },
        evaluate={"guard": {"tasks": ["choose", "say"], "include_path": str(tasks), "batch_size": 4}},
    )
    return recipe_file(made, folder / "recipe.yaml")


def test_every_arm_is_scored_told_shown_verified_and_resumed(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(recipe)]) == 0
    out = capsys.readouterr().out
    run = recipe.parent / "runs" / "tiny"
    assert "guard: reference" in out and "guard: selected" in out
    (line,) = [each for each in out.splitlines() if each.strip().startswith("choose acc:") and "->" in each]
    assert line.endswith(("no clear change", "worse", "better"))
    page = (run / "report.html").read_text("utf-8")
    assert "What it costs elsewhere" in page and "Perplexity of other text" in page
    results = read_json(run / "evaluation" / "results.json")
    assert {arm["name"] for arm in results["arms"] if arm["side_effects"]["nats"]} == {
        "reference",
        "selected",
    }
    assert main(["verify", str(run)]) == 0

    shutil.rmtree(run / "guard" / "selected")
    capsys.readouterr()
    assert main(["evaluate", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "guard: selected" in out and "guard: reference" not in out  # kept, as the policy is


def test_a_task_that_is_not_there_is_one_line(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = ["evaluate", str(recipe), "--fresh", "--evaluate.guard.tasks", "[absent]"]
    assert main(again) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "lm-evaluation-harness failed" in line and "absent" in line
