"""What alignment costs: repetition, endings, other text, tasks; expected values by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from selective_dpo.config import GuardConfig
from selective_dpo.errors import ConfigError, DataError, IdentityError, ModelError
from selective_dpo.evaluation import side_effects as module
from selective_dpo.evaluation.generate import Answer
from selective_dpo.evaluation.results import ArmResult, EvaluationResults, from_json, to_json
from selective_dpo.evaluation.side_effects import (
    check_guard,
    measure,
    read_documents,
    read_harness,
    run_tasks,
    side_effects,
    task_line,
    task_scores,
    text_nats,
)
from selective_dpo.report.tables import side_effect_notes
from selective_dpo.stats.side_effects import change, repeated_share
from selective_dpo.storage.artifacts import write_json
from tests.fixtures.models import tiny_model_folder

WORSE = {
    "p": (Answer("a b c d e a b c d e", 9, ended=False),),
    "q": (Answer("x", 1), Answer("y", 1, ended=False)),
}
START = {"p": (Answer("a b c d e", 5),), "q": (Answer("x", 1), Answer("y", 1))}


def test_the_repeated_share_is_of_word_4_grams() -> None:
    assert repeated_share("one two three") == 0.0
    # abcd bcde cdea deab eabc abcd bcde: 7, of which 5 are new.
    assert repeated_share("a b c d e a b c d e") == pytest.approx(2 / 7)
    assert repeated_share("a " * 10) == pytest.approx(6 / 7)


def test_changes_are_paired_by_prompt_and_the_value_is_over_all() -> None:
    found = change({"p": [0.0], "q": [1.0, 0.0]}, {"q": [1.0, 1.0], "p": [1.0]})
    assert found.value.value == pytest.approx(1 / 3)
    assert found.minus_start is not None and found.minus_start.value == pytest.approx((-1.0 - 0.5) / 2)
    assert change({"p": [1.0]}, None).minus_start is None
    with pytest.raises(IdentityError):
        change({"p": [1.0]}, {"q": [1.0]})


def test_an_arm_beside_the_starting_model() -> None:
    start = measure(START, {"d": 1.0, "e": 2.0})
    found = side_effects(measure(WORSE, {"d": 1.1, "e": 2.3}), start)
    assert found.ended is not None and found.repeated is not None and found.nats is not None
    assert found.ended.value.value == pytest.approx(1 / 3)
    assert found.repeated.value.value == pytest.approx((2 / 7) / 3)
    assert found.nats.minus_start is not None and found.nats.minus_start.value == pytest.approx(0.2)
    assert side_effects(start, None).ended.minus_start is None  # type: ignore[union-attr]


def test_what_is_clearly_worse_is_said_and_a_little_is_not() -> None:
    many = {f"p{i}": (Answer("a", 1, ended=i % 2 == 0),) for i in range(400)}
    start = {f"p{i}": (Answer("a", 1),) for i in range(400)}
    nats = {f"d{i}": 1.0 + (i % 7) / 10 for i in range(400)}
    reference = measure(start, nats)
    arm = side_effects(measure(many, {name: value + 0.06 for name, value in nats.items()}), reference)
    assert arm.worse == ["fewer answers end by themselves", "other text has become less likely"]
    little = side_effects(measure(start, {name: value + 0.01 for name, value in nats.items()}), reference)
    assert little.worse == []
    results = EvaluationResults("none", 400, 1, (ArmResult("selected", "easiest", 1, 1, side_effects=arm),))
    (note,) = side_effect_notes(results)
    assert note.startswith("Warning: selected beside the starting model: fewer answers end by themselves, ")
    again = from_json(json.loads(json.dumps(to_json(results))))
    assert again == results


def test_nats_of_text_are_the_models_own_loss(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder(tmp_path / "m"), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    documents = {
        f"d{size}": torch.randint(0, 60, (size,), generator=generator).tolist() for size in (1, 2, 9, 40, 41)
    }
    found = text_nats(model, documents)
    assert set(found) == {"d2", "d9", "d40", "d41"}  # of one token nothing is predicted
    for name, value in found.items():
        ids = torch.tensor([documents[name]])
        assert value == pytest.approx(float(model(input_ids=ids, labels=ids).loss.detach()), abs=1e-5)
    assert model.training is False


def test_documents_are_paragraphs_or_a_column(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.\nStill one.\n\n\nTwo.\n\nTwo.\n")
    assert sorted(read_documents(tmp_path / "a.txt").values()) == ["One.\nStill one.", "Two."]
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"other": 1}\n')
    assert list(read_documents(tmp_path / "a.jsonl").values()) == ["x"]
    (tmp_path / "b.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(DataError, match="holds no text"):
        read_documents(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match="no file"):
        read_documents(tmp_path / "c.txt")


# --- lm-evaluation-harness --------------------------------------------------------------------------------


def harness_output(folder: Path, values: list[float], *, first: int = 0) -> Path:
    """As `lm_eval --log_samples` writes it: a task with two filters, and one whose value is no number."""
    place = folder / "model__name"
    place.mkdir(parents=True)
    stamp = "2026-11-25T11-10-17.281210"
    samples = [
        {
            "doc_id": i,
            "doc_hash": f"{first + i:016d}".ljust(64, "0"),
            "filter": kind,
            "metrics": ["exact_match", "odd"],
            "exact_match": value if kind == "strict" else 1.0,
            "odd": [1, 2],
        }
        for i, value in enumerate(values)
        for kind in ("strict", "loose")
    ]
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    (place / f"samples_my_task_{stamp}.jsonl").write_text(lines)
    told = {"results": {}, "higher_is_better": {"my_task": {"exact_match": True}}, "versions": {"my_task": 1}}
    (place / f"results_{stamp}.json").write_text(json.dumps(told))
    return folder


def scored(folder: Path, values: list[float], **others: int) -> Path:
    table, tasks = read_harness(harness_output(folder / "out", values, **others))
    module.pq.write_table(table, folder / "scores.parquet")
    write_json(folder / "tasks.json", tasks)
    return folder


def test_scores_are_compared_document_by_document(tmp_path: Path) -> None:
    start = scored(tmp_path / "a", [1.0, 1.0, 1.0, 1.0, 0.0])
    arm = scored(tmp_path / "b", [1.0, 0.0, 0.0, 0.0, 0.0])
    loose, strict = task_scores(arm, start)
    assert (strict.task, strict.metric) == ("my_task", "exact_match,strict")
    assert strict.score.value.value == pytest.approx(0.2)
    # Differences 0 -1 -1 -1 0: mean -.6, standard error sqrt(1.2 / 5 / 4).
    found = strict.score.minus_start
    assert found is not None and found.value == pytest.approx(-0.6)
    assert found.standard_error == pytest.approx(math.sqrt(1.2 / 20))
    assert strict.verdict == "worse" and loose.verdict == "no clear change"
    half = 100 * 1.959964 * math.sqrt(1.2 / 20)
    assert task_line(strict) == f"my_task exact_match,strict: 80.0 -> 20.0, -60.0 ± {half:.1f}, worse"
    assert task_scores(start, arm)[1].verdict == "better"
    assert task_line(task_scores(start, None)[1]).startswith("my_task exact_match,strict: 80.0 ± ")


def test_other_documents_are_not_compared(tmp_path: Path) -> None:
    start, arm = scored(tmp_path / "a", [1.0, 0.0]), scored(tmp_path / "b", [1.0, 0.0], first=9)
    with pytest.raises(IdentityError):
        task_scores(arm, start)


def test_a_harness_without_samples_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="left no samples"):
        read_harness(tmp_path)


def test_code_in_a_tasks_file_is_refused_unless_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    (tmp_path / "plain.yaml").write_text("task: a\n")
    config = GuardConfig(tasks=("a",), include_path=str(tmp_path))
    check_guard(config)
    (tmp_path / "code.yaml").write_text("task: b\nprocess_docs: !function utils.process\n")
    with pytest.raises(ConfigError, match=r"run code of their own \(code.yaml\): read it, then set"):
        check_guard(config)
    check_guard(config.model_copy(update={"allow_code": True}))
    with pytest.raises(ConfigError, match="no folder"):
        check_guard(GuardConfig(tasks=("a",), include_path=str(tmp_path / "absent")))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'selective-dpo\[guard\]'"):
        check_guard(config)


def test_a_path_that_the_harness_would_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no path with ',' or '='"):
        run_tasks(
            GuardConfig(tasks=("a",)),
            tmp_path,
            model="a,b",
            adapter=None,
            tokenizer=tmp_path,
            dtype="float32",
            device="cpu",
        )
