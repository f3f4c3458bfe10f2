"""A run answers a benchmark's questions with every arm, keeps each arm's answers, and knows them again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from selective_dpo.evaluation.benchmarks import read_questions
from selective_dpo.run.run import evaluate, open_run
from selective_dpo.run.verify import verify_run
from tests.fixtures.models import tiny_recipe


def test_every_arm_answers_and_what_is_there_is_kept(tmp_path: Path) -> None:
    source = tmp_path / "question.jsonl"
    rows = [
        {"question_id": number, "category": category, "turns": ["Why?", "How?"]}
        for number, category in ((81, "writing"), (111, "math"))
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    recipe = tiny_recipe(
        tmp_path,
        score={"evaluations": 1},
        evaluate={"benchmarks": {"mt-bench": {"source": str(source), "max_new_tokens": 3}}},
    )
    evaluate(open_run(recipe, say=lambda line: None))
    root = tmp_path / "runs" / "tiny"
    found = {arm: root / f"benchmarks/mt-bench/{arm}/tiny-{arm}.jsonl" for arm in ("reference", "selected")}
    for arm, path in found.items():
        answers = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        assert [answer["question_id"] for answer in answers] == [81, 111]
        assert {answer["model_id"] for answer in answers} == {f"tiny-{arm}"}
        assert all(len(choice["turns"]) == 2 for answer in answers for choice in answer["choices"])
    assert not verify_run(root).problems

    # An arm that is not there is answered again, by the same seed; the other one is kept as it is.
    before = {arm: path.read_bytes() for arm, path in found.items()}
    shutil.rmtree(found["selected"].parent)
    lines: list[str] = []
    evaluate(open_run(recipe, say=lines.append))
    assert [line for line in lines if "mt-bench" in line] == [
        f"mt-bench: answers of selected in {found['selected'].parent}"
    ]
    assert found["reference"].read_bytes() == before["reference"]
    again = [json.loads(line)["choices"] for line in found["selected"].read_text("utf-8").splitlines()]
    assert again == [json.loads(line)["choices"] for line in before["selected"].splitlines()]
    assert len(read_questions("mt-bench", source)) == 2
