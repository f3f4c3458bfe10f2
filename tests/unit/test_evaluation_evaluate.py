"""The composition: arms, one at a time, against the starting model."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from transformers import Qwen2Config, Qwen2ForCausalLM

from selective_dpo.config import EvaluateConfig, GenerationConfig
from selective_dpo.errors import ConfigError
from selective_dpo.evaluation.evaluate import VERDICT_COLUMNS, Arm, Evaluation, evaluate_arms, judge_answers
from selective_dpo.evaluation.generate import Answer, Prompt
from selective_dpo.evaluation.results import PreferenceMetrics, from_json, preference_metrics
from selective_dpo.identity import Text
from selective_dpo.stats.win_rates import (
    Verdicts,
    cross_pairing,
    scores_from_rewards,
    win_rate,
    win_rate_difference,
)
from tests.fixtures.tokenizers import VOCABULARY_SIZE, byte_tokenizer

PROMPTS = [Prompt(f"p{number}", f"question {number}") for number in range(6)]
HELD_OUT = preference_metrics([0.5, 0.7], [1.0, -1.0], ["x", "y"])


class LongerIsBetter:
    name = "length"

    def compare(
        self, prompts: Sequence[Text], answers_a: Sequence[str], answers_b: Sequence[str]
    ) -> NDArray[np.float64]:
        assert len(prompts) == len(answers_a) == len(answers_b)
        return scores_from_rewards([len(text) for text in answers_a], [len(text) for text in answers_b])


def tiny_model(seed: int) -> Any:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def arm(name: str, seed: int, **changes: Any) -> Arm:
    return Arm(
        **(
            {"name": name, "label": name, "pairs": 8, "updates": 2, "load": lambda: tiny_model(seed)}
            | changes
        )
    )


def config(**changes: Any) -> EvaluateConfig:
    settings = {"prompts": 4, "samples": 3, "max_new_tokens": 4, "batch_size": 12, "seed": 1}
    return EvaluateConfig(generation=GenerationConfig(**(settings | changes)))


def evaluate(arms: list[Arm], **changes: Any) -> Evaluation:
    settings: dict[str, Any] = {
        "tokenizer": byte_tokenizer(),
        "prompts": PROMPTS,
        "config": config(),
        "judge": LongerIsBetter(),
    }
    return evaluate_arms(arms, arm("reference", 0), **(settings | changes))


def test_all_samples_of_a_prompt_meet_all_of_the_opponents() -> None:
    answers = {"p": (Answer("aaa", 3), Answer("a", 1)), "q": (Answer("", 0), Answer("aaaa", 4))}
    opponents = {"p": (Answer("bb", 2), Answer("b", 1)), "q": (Answer("b", 1), Answer("bbbb", 4))}
    prompts = [Prompt("q", "?"), Prompt("p", "?")]
    verdicts = judge_answers(LongerIsBetter(), "a", prompts, answers, opponents, cross_pairing(2, 2))
    assert dict(zip(verdicts.schema.names, verdicts.schema.types, strict=True)) == VERDICT_COLUMNS
    assert verdicts["arm"].to_pylist() == ["a"] * 8
    assert verdicts["prompt_id"].to_pylist() == ["q"] * 4 + ["p"] * 4
    assert verdicts["sample"].to_pylist() == [0, 0, 1, 1] * 2
    assert verdicts["opponent_sample"].to_pylist() == [0, 1, 0, 1] * 2
    # q: "" loses to both; "aaaa" beats "b", ties "bbbb". p: "aaa" beats both; "a" loses to "bb", ties "b".
    assert verdicts["score"].to_pylist() == [0, 0, 1, 0.5, 1, 1, 0, 0.5]


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    """Two arms, to be read only."""
    return evaluate([arm("selected", 1), arm("all", 2)])


def test_results_follow_from_the_verdicts_that_are_written(evaluation: Evaluation, tmp_path: Path) -> None:
    evaluation.write(tmp_path)
    results = from_json(json.loads((tmp_path / "results.json").read_text("utf-8")))
    assert (results.judge, results.prompts, results.samples) == ("length", 4, 3)
    assert [found.name for found in results.arms] == ["reference", "selected", "all"]
    rows = pq.read_table(tmp_path / "verdicts.parquet").to_pylist()
    by_arm = {
        name: Verdicts(
            [row["prompt_id"] for row in rows if row["arm"] == name],
            [row["score"] for row in rows if row["arm"] == name],
        )
        for name in ("reference", "selected", "all")
    }
    # 4 prompts; 3 x 3 comparisons for an arm, 3 different pairs of samples for the starting model
    assert [len(found.prompt_ids_N) for found in by_arm.values()] == [12, 36, 36]
    assert all(row["sample"] < row["opponent_sample"] for row in rows if row["arm"] == "reference")
    for found in results.arms:
        assert found.win_rate == pytest.approx(win_rate(by_arm[found.name]))
    reference, selected, everything = results.arms
    assert selected.difference is None
    assert everything.difference == pytest.approx(win_rate_difference(by_arm["selected"], by_arm["all"]))
    assert reference.difference is not None


def test_verdicts_agree_with_the_generations_that_are_written(evaluation: Evaluation, tmp_path: Path) -> None:
    evaluation.write(tmp_path)
    answers = {
        (row["arm"], row["prompt_id"], row["sample"]): row["answer"]
        for row in pq.read_table(tmp_path / "generations.parquet").to_pylist()
    }
    assert len(answers) == 3 * 4 * 3
    for row in pq.read_table(tmp_path / "verdicts.parquet").to_pylist():
        own = answers[row["arm"], row["prompt_id"], row["sample"]]
        opponent = answers["reference", row["prompt_id"], row["opponent_sample"]]
        assert row["score"] == scores_from_rewards([len(own)], [len(opponent)])[0]
    outputs = json.loads((tmp_path / "alpaca_eval_outputs" / "selected.json").read_text("utf-8"))
    assert len(outputs) == 4
    first = {answer for (name, _, sample), answer in answers.items() if (name, sample) == ("selected", 0)}
    assert {output["output"] for output in outputs} == first


def test_an_arm_equal_to_the_starting_model_does_not_just_tie() -> None:
    # The same weights, but samples of its own: equal texts would mean common random numbers.
    evaluation = evaluate([arm("selected", 0)])
    own, opponent = evaluation.answers_by_arm["selected"], evaluation.answers_by_arm["reference"]
    assert own != opponent


def test_one_model_is_held_at_a_time() -> None:
    alive: list[weakref.ref[Any]] = []

    def loading(seed: int) -> Callable[[], Any]:
        def load() -> Any:
            assert all(model() is None for model in alive), "the model before is still in memory"
            model = tiny_model(seed)
            model.__dict__["forward_of"] = model  # such a cycle is what a replaced forward makes
            alive.append(weakref.ref(model))
            return model

        return load

    evaluate_arms(
        [
            arm("selected", 1, load=loading(1), held_out=lambda model: HELD_OUT),
            arm("all", 2, load=loading(2)),
        ],
        arm("reference", 0, load=loading(0)),
        tokenizer=byte_tokenizer(),
        prompts=PROMPTS,
        config=config(),
        judge=LongerIsBetter(),
    )
    assert len(alive) == 3
    assert all(model() is None for model in alive)


def test_without_generation_only_held_out_pairs_are_measured(tmp_path: Path) -> None:
    def never() -> Any:
        raise AssertionError("nothing asks for this model")

    seen: list[Any] = []

    def measure(model: Any) -> PreferenceMetrics:
        seen.append(type(model))
        return HELD_OUT

    evaluation = evaluate_arms(
        [arm("selected", 1, held_out=measure)],
        arm("reference", 0, load=never),
        tokenizer=byte_tokenizer(),
        prompts=[],
        config=EvaluateConfig(),
    )
    evaluation.write(tmp_path)
    results = from_json(json.loads((tmp_path / "results.json").read_text("utf-8")))
    assert (results.judge, results.prompts, results.samples) == ("none", 0, 0)
    assert results.arms[1].held_out == HELD_OUT
    assert results.arms[1].win_rate is results.arms[1].answer_tokens is None
    assert seen == [Qwen2ForCausalLM]
    assert pq.read_table(tmp_path / "generations.parquet").num_rows == 0
    assert not (tmp_path / "alpaca_eval_outputs").exists()


def test_answers_without_a_judge_have_lengths_and_no_win_rate() -> None:
    evaluation = evaluate([arm("selected", 1)], judge=None)
    selected = evaluation.results.arms[1]
    assert selected.answer_tokens.value <= 4
    assert selected.win_rate is selected.difference is None
    assert evaluation.verdicts.num_rows == 0


def test_one_sample_leaves_the_starting_model_without_a_win_rate() -> None:
    evaluation = evaluate([arm("selected", 1), arm("all", 2)], config=config(samples=1))
    reference, selected, everything = evaluation.results.arms
    assert reference.win_rate is reference.difference is None
    assert selected.win_rate is not None
    assert everything.difference is not None


def test_without_a_selected_arm_there_are_no_differences() -> None:
    evaluation = evaluate([arm("all", 2)])
    assert all(found.difference is None for found in evaluation.results.arms)


@pytest.mark.parametrize("name", ["../up", "", "a b", "reference"])
def test_names_that_cannot_be_used_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.controls"):
        evaluate([arm(name, 1)])


def test_a_name_that_stands_twice_and_missing_prompts_are_refused() -> None:
    with pytest.raises(ConfigError, match="'selected' is taken"):
        evaluate([arm("selected", 1), arm("selected", 2)])
    with pytest.raises(ConfigError, match=r"give data\.test"):
        evaluate([arm("selected", 1)], prompts=[])
    with pytest.raises(ConfigError, match="no effect at temperature 0"):
        evaluate([arm("selected", 1)], config=config(temperature=0.0))
