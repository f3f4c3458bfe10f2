"""Benchmarks' questions are read from their own files, and answers written in their own shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from selective_dpo.config import EvaluateConfig, GenerationConfig
from selective_dpo.config.schema import BenchmarkConfig, BenchmarkName
from selective_dpo.data.readers import read_file
from selective_dpo.errors import DataError, IdentityError
from selective_dpo.evaluation import benchmarks
from selective_dpo.evaluation.benchmarks import (
    answer_questions,
    question_file,
    read_questions,
    temperature_of,
    write_answers,
)
from selective_dpo.evaluation.generate import Answer, Prompt

ROWS: dict[BenchmarkName, list[dict[str, Any]]] = {
    "alpaca-eval": [
        {"instruction": "Why?", "output": "the baseline's", "dataset": "koala", "generator": "g"},
        {"instruction": "How?", "output": "the baseline's", "generator": "g"},
    ],
    "arena-hard": [{"uid": "ab12", "category": "hard_prompt", "cluster": "c", "prompt": "Prove it."}],
    "mt-bench": [
        {"question_id": 81, "category": "writing", "turns": ["Write.", "Shorter."]},
        {"question_id": 111, "category": "math", "turns": ["Add.", "Subtract."]},
        {"question_id": 7, "category": "of one's own", "turns": ["One.", "Two."]},
    ],
}


def questions_at(path: Path, name: BenchmarkName) -> Path:
    rows = ROWS[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, "utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("alpaca-eval", "results/gpt4_1106_preview/model_outputs.json"),
        ("arena-hard", "data/arena-hard-v0.1/question.jsonl"),
        ("mt-bench", "fastchat/llm_judge/data/mt_bench/question.jsonl"),
    ],
)
def test_a_checkout_or_the_file_itself_is_the_source(tmp_path: Path, name: BenchmarkName, place: str) -> None:
    path = questions_at(tmp_path / place, name)
    assert question_file(name, str(tmp_path)) == question_file(name, str(path)) == path
    assert [question.row for question in read_questions(name, path)] == ROWS[name]


def test_a_source_without_questions_or_with_several_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mt-bench.source: .* has none at question.jsonl or"):
        question_file("mt-bench", str(tmp_path))
    for version in ("v0.1", "v2.0"):
        questions_at(tmp_path / f"data/arena-hard-{version}/question.jsonl", "arena-hard")
    with pytest.raises(DataError, match=r"several question files, name one: .*v0.1.*v2.0"):
        question_file("arena-hard", str(tmp_path))


def test_rows_that_are_no_questions_are_named(tmp_path: Path) -> None:
    path = tmp_path / "question.jsonl"
    path.write_text('{"question_id": 1, "category": "math", "turns": ["only one"]}\n')
    with pytest.raises(DataError, match=r"row 0: no question of mt-bench: it needs .*two `turns`"):
        read_questions("mt-bench", path)
    path.write_text('{"question_id": "old", "turns": [{"content": "x"}]}\n')
    with pytest.raises(DataError, match="no question of arena-hard: it needs `uid` and `prompt`"):
        read_questions("arena-hard", path)
    path.write_text("\n")
    with pytest.raises(DataError, match="holds no questions"):
        read_questions("mt-bench", path)
    path.write_text('{"instruction": "twice"}\n' * 2)
    with pytest.raises(IdentityError, match="twice"):
        read_questions("alpaca-eval", path)


def test_each_benchmark_has_its_own_decoding(tmp_path: Path) -> None:
    temperatures = {}
    for name in ROWS:
        questions = read_questions(name, questions_at(tmp_path / f"{name}.jsonl", name))
        config = BenchmarkConfig(source="-")
        temperatures[name] = [temperature_of(name, question, config) for question in questions]
    assert temperatures == {"alpaca-eval": [0.7, 0.7], "arena-hard": [0.0], "mt-bench": [0.7, 0.0, 0.7]}
    with pytest.raises(ValidationError, match="one for each category"):
        EvaluateConfig.model_validate({"benchmarks": {"mt-bench": {"source": "-", "temperature": 0.1}}})
    with pytest.raises(ValidationError, match="benchmarks"):
        EvaluateConfig.model_validate({"benchmarks": {"mmlu": {"source": "-"}}})


def test_the_second_turn_is_asked_after_the_first_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[float, int, list[Prompt]]] = []

    def generate(
        model: Any, tokenizer: Any, prompts: list[Prompt], config: GenerationConfig, **others: Any
    ) -> dict[str, tuple[Answer, ...]]:
        calls.append((config.temperature, config.max_new_tokens, prompts))
        return {each.prompt_id: (Answer(f"to {each.text[-1]['content']}", 1),) for each in prompts}  # type: ignore[index]

    monkeypatch.setattr(benchmarks, "generate_answers", generate)
    questions = read_questions("mt-bench", questions_at(tmp_path / "question.jsonl", "mt-bench"))
    found = answer_questions(
        None, None, "mt-bench", questions, BenchmarkConfig(source="-"), GenerationConfig(), stream="all"
    )
    assert found == {
        "81": ("to Write.", "to Shorter."),
        "111": ("to Add.", "to Subtract."),
        "7": ("to One.", "to Two."),
    }
    asked = [(heat, length, [each.prompt_id for each in prompts]) for heat, length, prompts in calls]
    assert asked == [(0.0, 1024, ["111"]), (0.7, 1024, ["81", "7"])] * 2
    assert calls[2][2][0].text == [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "to Add."},
        {"role": "user", "content": "Subtract."},
    ]


def test_answers_have_the_shapes_of_the_official_programs(tmp_path: Path) -> None:
    written: dict[str, Any] = {}
    for name in ROWS:
        questions = read_questions(name, questions_at(tmp_path / f"{name}.jsonl", name))
        answers = {each.identity: ["café"] * len(each.turns) for each in questions}
        path = write_answers(tmp_path, name, "run-all", questions, answers)
        assert path.stem == "run-all"
        assert path.suffix == (".json" if name == "alpaca-eval" else ".jsonl")
        written[name] = list(read_file(path))
    assert written["alpaca-eval"] == [
        {"instruction": "Why?", "output": "café", "generator": "run-all", "dataset": "koala"},
        {"instruction": "How?", "output": "café", "generator": "run-all"},
    ]
    (row,) = written["arena-hard"]
    assert set(row) == {"uid", "ans_id", "model", "messages", "tstamp"}
    assert (row["uid"], row["model"]) == ("ab12", "run-all")
    assert row["messages"][-1]["content"]["answer"] == "café"
    assert row["messages"][0] == {"role": "user", "content": "Prove it."}
    first, *_ = written["mt-bench"]
    assert set(first) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert (first["question_id"], first["model_id"]) == (81, "run-all")
    assert first["choices"] == [{"index": 0, "turns": ["café", "café"]}]
    assert len({each["answer_id"] for each in written["mt-bench"]}) == 3
