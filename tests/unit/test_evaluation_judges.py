"""Judges: the embedded world's gold reward, and reward models made on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

from selective_dpo.config import EvaluateConfig, GenerationConfig
from selective_dpo.errors import DataError, ModelError
from selective_dpo.evaluation.judges import RewardJudge, RewardModelJudge, WorldJudge, judge_for
from selective_dpo.identity import Text
from selective_dpo.stats.win_rates import scores_from_rewards
from tests.fixtures.tokenizers import PAD_ID, VOCABULARY_SIZE, byte_tokenizer

PROMPTS: list[Text] = [
    "why?",
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
]


class LengthJudge(RewardJudge):
    """Longer is better; remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    @property
    def name(self) -> str:
        return "length"

    def fingerprint(self) -> str:
        return ""

    def rewards(self, prompts: Sequence[Text], answers: Sequence[str]) -> list[float]:
        self.asked += answers
        return [float("nan") if answer == "nan" else float(len(answer)) for answer in answers]


def config_of(**changes: Any) -> Qwen2Config:
    settings = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "num_labels": 1,
        "pad_token_id": PAD_ID,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return Qwen2Config(**(settings | changes))


def save_classifier(folder: Path, *, template: bool = True, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = Qwen2ForSequenceClassification(config_of(**changes)).eval()
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer() if template else byte_tokenizer(template=None)
    tokenizer.save_pretrained(folder)
    return model


def test_scores_from_rewards() -> None:
    np.testing.assert_array_equal(scores_from_rewards([2.0, 1.0, 1.0], [1.0, 1.0, 2.0]), [1.0, 0.5, 0.0])


def test_an_answer_is_looked_at_once_over_all_comparisons() -> None:
    judge = LengthJudge()
    scores = judge.compare(["p", "p", "q"], ["aaa", "aaa", "aaa"], ["b", "cccc", "aaa"])
    np.testing.assert_array_equal(scores, [1.0, 0.0, 0.5])
    assert judge.asked == ["aaa", "aaa", "b", "cccc"]  # "aaa" once for each of the two prompts
    judge.compare(["p"], ["b"], ["new"])
    assert judge.asked[4:] == ["new"]


def test_a_reward_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(ModelError, match="1 answers a reward that is not finite"):
        LengthJudge().compare(["p"], ["nan"], ["x"])


def test_embedded_world() -> None:
    # copy of a b c: exact gives 2; "a b d" has 1 of 3 wrong, 2/3; "a c" and "b c" lack one of 3, 2/3.
    prompt = "copy : a b c ="
    scores = WorldJudge("embedded-world", "tasks").compare(
        [prompt] * 3, ["a b c", "a c", "a b d"], ["a b d", "b c", "a b c"]
    )
    np.testing.assert_array_equal(scores, [1.0, 0.5, 0.0])
    with pytest.raises(DataError, match="one-message prompts"):
        WorldJudge("embedded-world", "tasks").compare([PROMPTS[1]], ["a"], ["b"])


def test_rewards_are_the_classifiers_outputs_for_its_own_template(tmp_path: Path) -> None:
    model = save_classifier(tmp_path)
    judge = RewardModelJudge(str(tmp_path), device="cpu", batch_size=2)
    answers = ["because", "hi, how are you today?"]
    rendered = [
        "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\nbecause<|im_end|>\n",
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\nhi, how are you today?<|im_end|>\n",
    ]
    tokenizer = byte_tokenizer()
    expected = []
    for text in rendered:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected.append(model(ids).logits.item())
    np.testing.assert_allclose(judge.rewards(PROMPTS, answers), expected, atol=1e-5)


def test_reward_model_compares_and_ties_with_itself(tmp_path: Path) -> None:
    save_classifier(tmp_path)
    judge = RewardModelJudge(str(tmp_path), device="cpu")
    first, second = judge.rewards(["p", "p"], ["one", "another"])
    scores = judge.compare(["p"] * 3, ["one", "another", "one"], ["another", "one", "one"])
    np.testing.assert_array_equal(scores, [float(first > second), float(second > first), 0.5])


def test_a_classifier_without_a_padding_token_gives_the_same_rewards(tmp_path: Path) -> None:
    save_classifier(tmp_path / "with")
    save_classifier(tmp_path / "without", pad_token_id=None)
    answers = ["a", "a longer one"]
    with_padding = RewardModelJudge(str(tmp_path / "with"), device="cpu").rewards(PROMPTS, answers)
    without = RewardModelJudge(str(tmp_path / "without"), device="cpu").rewards(PROMPTS, answers)
    np.testing.assert_allclose(with_padding, without, atol=1e-5)


def test_what_is_no_reward_model_is_refused_before_any_weights_are_read(tmp_path: Path) -> None:
    save_classifier(tmp_path / "two", num_labels=2)
    with pytest.raises(ModelError, match="has 2 outputs"):
        RewardModelJudge(str(tmp_path / "two"))
    save_classifier(tmp_path / "bare", template=False)
    with pytest.raises(ModelError, match="no chat template"):
        RewardModelJudge(str(tmp_path / "bare"))
    with pytest.raises(ModelError, match="cannot load reward model"):
        RewardModelJudge(str(tmp_path / "absent"))


def test_a_language_model_has_no_reward_head(tmp_path: Path) -> None:
    Qwen2ForCausalLM(config_of()).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    judge = RewardModelJudge(str(tmp_path), device="cpu")
    with pytest.raises(ModelError, match=r"weights lack score\.weight"):
        judge.rewards(["p"], ["a"])


def test_a_conversation_longer_than_the_model_is_refused(tmp_path: Path) -> None:
    save_classifier(tmp_path, max_position_embeddings=40)
    with pytest.raises(ModelError, match="exceeds the 40 positions"):
        RewardModelJudge(str(tmp_path), device="cpu").rewards(["p"], ["x" * 40])


def test_the_recipe_names_the_judge(tmp_path: Path) -> None:
    save_classifier(tmp_path)
    generation = GenerationConfig(prompts=1)
    assert judge_for(EvaluateConfig()) is None
    world = judge_for(EvaluateConfig(judge="embedded-world", generation=generation))
    assert world is not None
    assert world.name == "embedded-world"
    config = EvaluateConfig(judge="reward-model", reward_model=str(tmp_path), generation=generation)
    judge = judge_for(config)
    assert judge is not None
    assert judge.name == f"reward-model {tmp_path}"
