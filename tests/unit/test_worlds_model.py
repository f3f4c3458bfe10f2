"""The world's tokenizer, demonstrations, training and sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from selective_dpo.worlds.model import (
    IGNORED,
    SYMBOL_IDS,
    VOCABULARY_SIZE,
    SFTConfig,
    TasksConfig,
    answer_loss,
    build_tokenizer,
    draw_demonstrations,
    learning_rate_factor,
    model_config,
    overwrite,
    sample_answers,
    save_model,
    train_sft,
)
from selective_dpo.worlds.tasks import correct_answer, draw_tasks, gold_reward, parse_prompt, prompt_text

PROMPT, ANSWER = "reverse : a c f d =", " d f c a"
TINY = SFTConfig(hidden_size=16, layers=1, heads=2, feed_forward_size=32, steps=20, batch_size=16)


def ids_of(text: str) -> list[int]:
    return [SYMBOL_IDS[symbol] for symbol in text.split()]


@pytest.fixture
def tiny_model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    # Weights large enough that the probabilities are far from uniform.
    return Qwen2ForCausalLM(model_config(TINY.model_copy(update={"initializer_range": 0.7}))).eval()


@pytest.fixture(params=["as built", "as loaded"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path, tiny_model: Qwen2ForCausalLM) -> Any:
    if request.param == "as built":
        return build_tokenizer()
    save_model(tiny_model, tmp_path / "model")
    return AutoTokenizer.from_pretrained(tmp_path / "model")


def test_one_token_a_symbol_and_bos_in_front(tokenizer: Any) -> None:
    assert tokenizer(PROMPT)["input_ids"] == ids_of("<bos> reverse : a c f d =")
    assert len(tokenizer) == VOCABULARY_SIZE


def test_the_prompt_is_a_token_prefix_and_eos_comes_once(tokenizer: Any) -> None:
    # As TRL tokenizes text pairs: the prompt alone, and prompt + completion + <eos> as one text.
    whole = tokenizer(PROMPT + ANSWER + tokenizer.eos_token)["input_ids"]
    assert whole == ids_of("<bos> reverse : a c f d = d f c a <eos>")


def test_every_prompt_and_answer_keeps_its_boundary_and_survives_decoding(tokenizer: Any) -> None:
    config = TasksConfig()
    tasks = draw_tasks(200, np.random.default_rng(0), operations=config.operations, lengths=config.lengths)
    for task in tasks:
        prompt, answer = prompt_text(task), " " + correct_answer(task)
        prompt_ids = tokenizer(prompt)["input_ids"]
        whole = tokenizer(prompt + answer)["input_ids"]
        assert whole[: len(prompt_ids)] == prompt_ids
        assert tokenizer.decode(whole[len(prompt_ids) :]) == answer
        assert tokenizer.decode(prompt_ids, skip_special_tokens=True) == prompt


def test_demonstrations_are_prompt_answer_eos_with_labels_on_the_answer() -> None:
    drawn = draw_demonstrations(
        50, np.random.default_rng(0), operations=["reverse", "sums"], lengths=[3, 5], hasty_share=0.0
    )
    symbol_of = {token_id: symbol for symbol, token_id in SYMBOL_IDS.items()}
    for ids, labels in zip(drawn.input_ids_DT, drawn.labels_DT, strict=True):
        text = " ".join(symbol_of[token_id] for token_id in ids)
        prompt, _, rest = text.removeprefix("<bos> ").partition(" = ")
        answer, _, padding = rest.partition(" <eos>")
        assert answer == correct_answer(parse_prompt(prompt + " ="))
        assert set(padding.split()) <= {"<pad>"}
        labelled = [symbol_of[token_id] for token_id in labels if token_id != IGNORED]
        assert labelled == [*answer.split(), "<eos>"]
        np.testing.assert_array_equal(ids[labels != IGNORED], labels[labels != IGNORED])


def test_hasty_writers_overwrite_one_or_two_places() -> None:
    # A digit is overwritten by itself once in ten. One place: unchanged .1, one change .9; two places:
    # unchanged .01, one change .18, two .81. Equally likely: .055, .54, .405.
    # With 40,000 rows the standard errors are at most .0025.
    digits = np.tile(np.arange(5), (40_000, 1))
    changes = (overwrite(digits, np.random.default_rng(0)) != digits).sum(axis=1)
    shares = np.bincount(changes, minlength=6) / len(digits)
    np.testing.assert_allclose(shares, [0.055, 0.54, 0.405, 0, 0, 0], atol=0.01)


def test_the_hasty_share_of_answers_is_hasty() -> None:
    # An answer by a hasty writer differs from the right one with probability 1 - .055 = .945 (see above),
    # so .45 * .945 = .425 of copies are not copies. Standard error with 20,000: .0035.
    drawn = draw_demonstrations(
        20_000, np.random.default_rng(0), operations=["copy"], lengths=[4], hasty_share=0.45
    )
    operands, answers = drawn.input_ids_DT[:, 3:7], drawn.input_ids_DT[:, 8:12]
    assert (operands != answers).any(axis=1).mean() == pytest.approx(0.425, abs=0.014)


def test_learning_rate_warms_up_and_ends_where_it_should() -> None:
    config = SFTConfig(steps=1050, warmup_steps=50, final_learning_rate=0.1)
    assert learning_rate_factor(0, config) == pytest.approx(1 / 50)
    assert learning_rate_factor(49, config) == 1.0
    assert learning_rate_factor(50, config) == 1.0
    assert learning_rate_factor(550, config) == pytest.approx(0.55)  # half way: the mean of 1 and .1
    assert learning_rate_factor(1050, config) == pytest.approx(0.1)


def test_padding_does_not_change_the_loss(tiny_model: Qwen2ForCausalLM) -> None:
    ids = torch.tensor([ids_of("<bos> copy : a b = a b <eos>")])
    labels = torch.tensor([[IGNORED] * 6 + ids_of("a b <eos>")])
    padded_ids = torch.cat([ids, torch.tensor([ids_of("<pad> <pad>")])], dim=1)
    padded_labels = torch.cat([labels, torch.full((1, 2), IGNORED)], dim=1)
    # By the definition: minus the mean log-probability of the three answer tokens.
    log_probabilities = tiny_model(input_ids=ids).logits.log_softmax(-1)[0]
    expected = -sum(log_probabilities[at - 1, ids[0, at]] for at in (6, 7, 8)) / 3
    torch.testing.assert_close(answer_loss(tiny_model, ids, labels), expected)
    torch.testing.assert_close(answer_loss(tiny_model, padded_ids, padded_labels), expected)


def test_training_repeats_exactly_and_leaves_the_global_random_state() -> None:
    before = torch.random.get_rng_state()
    first, second = (train_sft(TasksConfig(), TINY, seed=5) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.loss == second.loss
    for left, right in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(left, right)
    other = train_sft(TasksConfig(), TINY, seed=6)
    assert other.loss != first.loss


@pytest.mark.slow
def test_a_little_model_learns_to_copy(tmp_path: Path) -> None:
    tasks = TasksConfig(operations=("copy",), lengths=(2,))
    config = SFTConfig(
        hidden_size=32, layers=2, heads=2, feed_forward_size=64, steps=300, batch_size=32, hasty_share=0.0
    )
    trained = train_sft(tasks, config, seed=0)
    save_model(trained.model, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    prompts = ["copy : a b =", "copy : j c =", "copy : e e ="]
    answers = sample_answers(model, tokenizer, prompts, samples=1, max_new_tokens=6, seed=0, temperature=0.0)
    assert answers == [[" a b"], [" j c"], [" e e"]]
    assert gold_reward(prompts[1], answers[1][0]) == 2.0


def test_greedy_answers_equal_those_of_transformers(tiny_model: Qwen2ForCausalLM) -> None:
    tokenizer = build_tokenizer()
    prompts = ["sums : a b c d =", "copy : a b c =", "swap : j i h g =", "rotate : a b c ="]
    ours = sample_answers(
        tiny_model, tokenizer, prompts, samples=1, max_new_tokens=7, seed=0, temperature=0.0
    )
    for prompt, (answer,) in zip(prompts, ours, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        out = tiny_model.generate(**inputs, max_new_tokens=7, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        assert answer == tokenizer.decode(new, skip_special_tokens=True)


def test_samples_follow_the_model_s_probabilities(tiny_model: Qwen2ForCausalLM) -> None:
    tokenizer = build_tokenizer()
    prompt = "copy : a b c ="
    draws = 4000
    (answers,) = sample_answers(tiny_model, tokenizer, [prompt], samples=draws, max_new_tokens=1, seed=3)
    logits = tiny_model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
    wanted = logits.softmax(-1).detach().numpy()
    for symbol in "abcdefghij":
        share = sum(answer == f" {symbol}" for answer in answers) / draws
        probability = float(wanted[SYMBOL_IDS[symbol]])
        # Five standard errors, for ten looks at once.
        assert share == pytest.approx(probability, abs=5 * (probability * (1 - probability) / draws) ** 0.5)


def test_samples_stand_in_the_order_of_the_prompts_and_repeat_with_the_seed(
    tiny_model: Qwen2ForCausalLM,
) -> None:
    tokenizer = build_tokenizer()
    prompts = ["copy : a b c d =", "copy : a b =", "copy : a b c ="]

    def draw(seed: int) -> list[list[str]]:
        return sample_answers(
            tiny_model, tokenizer, prompts, samples=5, max_new_tokens=4, seed=seed, batch_size=4
        )

    first = draw(0)
    assert [len(answers) for answers in first] == [5, 5, 5]
    assert draw(0) == first
    assert draw(1) != first
    assert not tiny_model.training
