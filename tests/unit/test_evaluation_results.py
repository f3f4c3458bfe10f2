"""results.json and the tables: what is written is what is read, and JSON knows no NaN."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from selective_dpo.errors import ArtifactError, DataError
from selective_dpo.evaluation.evaluate import (
    GENERATION_COLUMNS,
    VERDICT_COLUMNS,
    Evaluation,
    arm_result,
    at_equal_length,
    generations_table,
    length_controlled,
    model_outputs,
)
from selective_dpo.evaluation.generate import Answer, Prompt
from selective_dpo.evaluation.results import (
    ArmResult,
    EvaluationResults,
    PreferenceMetrics,
    from_json,
    preference_metrics,
    to_json,
)
from selective_dpo.stats.estimates import Estimate
from selective_dpo.stats.win_rates import Verdicts

CHAT = [
    {"role": "user", "content": "first"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "caf\u00e9 \ud83d?"},  # half of a surrogate pair: text that UTF-8 cannot hold
]
PROMPTS = [Prompt("p", "plain"), Prompt("q", CHAT)]
ANSWERS = {"p": (Answer("a", 1), Answer("bb", 3)), "q": (Answer("c", 5), Answer("", 0))}


def full_results() -> EvaluationResults:
    arm = arm_result(
        name="all",
        label="all pairs, shuffled",
        pairs=10,
        updates=3,
        held_out=preference_metrics(
            [0.5, 0.7], [1.0, -1.0], ["p", "q"], np.array([[-3.0, -5.0], [-2.0, -4.0]])
        ),
        answers=ANSWERS,
        verdicts=Verdicts(["p", "q"], [0.5, 0.0]),
        selected_verdicts=Verdicts(["q", "p"], [0.5, 1.0]),
    )
    return EvaluationResults("a judge", 2, 2, (ArmResult("reference", "starting model", 0, 0), arm))


def test_length_control_is_told_by_arm_and_left_out_where_it_cannot_be() -> None:
    # The arm's answers are ten characters longer on half of the prompts and as much shorter on the others,
    # with the same verdicts: length does not count, and both rates are the share of wins, 3/4.
    ids = [f"p{number:02}" for number in range(40)]
    wins = [float(number % 4 != 0) for number in range(20)] * 2
    reference = {each: (Answer("x" * 20, 1),) for each in ids}
    lengths = [10] * 20 + [30] * 20
    arm = {each: (Answer("x" * length, 1),) for each, length in zip(ids, lengths, strict=True)}
    verdicts = {"all": Verdicts(ids, wins), "reference": Verdicts(ids, [0.5] * 40)}
    found = length_controlled(verdicts, {"reference": reference, "all": arm})
    assert list(found) == ["all"]
    rate = found["all"].win_rate
    assert rate.value == pytest.approx(0.75, abs=1e-6)
    assert rate.low < 0.75 < rate.high
    alone = at_equal_length(full_results().arms[1], found)  # there is no arm `selected`
    assert (alone.length_controlled, alone.length_controlled_difference) == (rate, None)
    # The arm `selected` wins one half at the same lengths: 1/2 - 3/4.
    both = {**verdicts, "selected": Verdicts(ids, [1.0, 0.0] * 20)}
    answers = {"reference": reference, "all": arm, "selected": arm}
    beside = at_equal_length(full_results().arms[1], length_controlled(both, answers))
    difference = beside.length_controlled_difference
    assert difference is not None
    assert difference.value == pytest.approx(-0.25, abs=1e-6)
    assert length_controlled(verdicts, {"reference": reference, "all": reference}) == {}  # of one length
    few = {name: Verdicts(ids[:19], each.scores_N[:19]) for name, each in verdicts.items()}  # type: ignore[index]
    assert length_controlled(few, {"reference": reference, "all": arm}) == {}


def test_an_arms_numbers() -> None:
    arm = full_results().arms[1]
    assert arm.win_rate is not None
    assert arm.difference is not None
    assert arm.answer_tokens is not None
    assert arm.win_rate.value == 0.25
    # p: 1 - .5, q: .5 - 0, the same difference
    assert (arm.difference.value, arm.difference.standard_error) == (0.5, 0.0)
    # Lengths 1, 3 | 5, 0: mean 9/4; residuals by prompt 4 - 4.5 = -.5 and .5; variance .5 / 4^2 * 2
    assert arm.answer_tokens.value == 2.25
    assert arm.answer_tokens.standard_error == pytest.approx(math.sqrt(0.5 / 16 * 2))


def test_what_was_not_measured_is_absent() -> None:
    arm = arm_result(
        name="all",
        label="",
        pairs=1,
        updates=1,
        held_out=None,
        answers={},
        verdicts=None,
        selected_verdicts=Verdicts(["p"], [1.0]),
    )
    assert (arm.held_out, arm.win_rate, arm.difference, arm.answer_tokens) == (None,) * 4


def test_json_round_trip_has_the_fields_of_the_format() -> None:
    content = to_json(full_results())
    assert list(content) == [
        "schema_version",
        "judge",
        "prompts",
        "samples",
        "arms",
        "repeats",
        "judge_notes",
    ]
    reference, arm = content["arms"]
    assert list(arm) == list(ArmResult._fields)
    assert list(arm["held_out"]) == list(PreferenceMetrics._fields)
    assert list(arm["win_rate"]) == ["value", "standard_error", "low", "high"]
    assert reference["held_out"] is reference["win_rate"] is reference["difference"] is None
    assert from_json(json.loads(json.dumps(content, allow_nan=False))) == full_results()


def test_a_standard_error_that_does_not_exist_is_null() -> None:
    lonely = ArmResult("all", "", 1, 1, win_rate=Estimate(0.5, math.nan, math.nan, math.nan))
    content = json.loads(json.dumps(to_json(EvaluationResults("j", 1, 1, (lonely,))), allow_nan=False))
    expected = {"value": 0.5, "standard_error": None, "low": None, "high": None}
    assert content["arms"][0]["win_rate"] == expected
    read = from_json(content).arms[0].win_rate
    assert read is not None
    assert math.isnan(read.standard_error)


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"arms": [{"name": "x"}]},
        {"arms": 3},
        {"surprise": 1},
        {"arms": [{**to_json(full_results())["arms"][1], "win_rate": {"value": 1}}]},
    ],
)
def test_other_content_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ArtifactError, match=r"results\.json"):
        from_json({**to_json(full_results()), **change})


def test_generations_table() -> None:
    table = generations_table(PROMPTS, {"reference": ANSWERS, "selected": {}})
    assert dict(zip(table.schema.names, table.schema.types, strict=True)) == GENERATION_COLUMNS
    assert table.column("sample").to_pylist() == [0, 1, 0, 1]
    assert table.column("answer").to_pylist() == ["a", "bb", "c", ""]
    assert table.column("tokens").to_pylist() == [1, 3, 5, 0]
    assert [json.loads(text) for text in table.column("prompt").to_pylist()[1:3]] == ["plain", CHAT]
    assert generations_table([], {}).num_rows == 0


def test_alpaca_eval_outputs(tmp_path: Path) -> None:
    tables = generations_table(PROMPTS, {"selected": ANSWERS}), pa.schema(VERDICT_COLUMNS).empty_table()
    Evaluation(full_results(), *tables, tuple(PROMPTS), {"selected": ANSWERS, "all": {}}).write(tmp_path)
    (path,) = (tmp_path / "alpaca_eval_outputs").iterdir()
    assert json.loads(path.read_text("utf-8")) == [
        {"instruction": "plain", "output": "a", "generator": "selected"},
        {"instruction": CHAT[-1]["content"], "output": "c", "generator": "selected"},
    ]


def test_a_prompt_without_a_user_has_no_instruction() -> None:
    with pytest.raises(DataError, match="without a user message"):
        model_outputs("selected", [Prompt("p", [{"role": "system", "content": "x"}])], ANSWERS)
