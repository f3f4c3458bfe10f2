"""Generation with tiny random models: what is asked, what comes back, and what is left as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from selective_dpo.config import GenerationConfig
from selective_dpo.data.adapters import Pair
from selective_dpo.data.tokenize import PairTokens, tokenize_pairs
from selective_dpo.errors import ConfigError, DataError, IdentityError, ModelError, TemplateError
from selective_dpo.evaluation.generate import (
    Answer,
    Prompt,
    choose_prompts,
    encode_prompt,
    generate_answers,
    turn_end_id,
)
from selective_dpo.identity import Text
from tests.fixtures.tokenizers import BOS_ID, END_ID, START_ID, VOCABULARY_SIZE, byte_tokenizer

PROMPTS = [Prompt(f"p{number}", "x" * length) for number, length in enumerate([3, 9, 1, 5, 7])]
CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture
def tokenizer() -> Any:
    return byte_tokenizer(bos=True)


def tiny_model(**changes: Any) -> Any:
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.5,  # sharp enough that attending to padding would change the answers
        "eos_token_id": None,
        "bos_token_id": None,
    }
    return Qwen2ForCausalLM(Qwen2Config(**(settings | changes))).eval()


def saying(text: str, tokenizer: Any, *, then: int) -> Any:
    """A model that says `text` after any prompt, and then the token `then` for ever."""
    script = [*tokenizer(text, add_special_tokens=False)["input_ids"], then]
    model = tiny_model()
    prompt_width: list[int] = []

    def forced(input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if not prompt_width:
            prompt_width.append(input_ids.shape[1])
        place = min(input_ids.shape[1] - prompt_width[0], len(script) - 1)
        forced_logits = torch.full_like(logits, -1e9)
        forced_logits[:, script[place]] = 0.0
        return forced_logits

    plain_generate = model.generate
    model.generate = lambda **inputs: plain_generate(**inputs, logits_processor=[forced])
    return model


def greedy(**changes: Any) -> GenerationConfig:
    return GenerationConfig(**({"prompts": 5, "max_new_tokens": 6, "temperature": 0.0} | changes))


def sampled(**changes: Any) -> GenerationConfig:
    return GenerationConfig(**({"prompts": 5, "max_new_tokens": 6, "samples": 2} | changes))


def test_batching_does_not_change_greedy_answers(tokenizer: Any) -> None:
    model = tiny_model()
    alone = generate_answers(model, tokenizer, PROMPTS, greedy(batch_size=1), stream="a")
    together = generate_answers(model, tokenizer, PROMPTS, greedy(batch_size=4), stream="a")
    assert alone == together
    assert list(together) == ["p0", "p1", "p2", "p3", "p4"]
    assert len({answers[0].text for answers in alone.values()}) > 1


def test_answers_equal_a_plain_loop_of_argmax(tokenizer: Any) -> None:
    model = tiny_model()
    answers = generate_answers(model, tokenizer, PROMPTS, greedy(), stream="a")
    ids = [BOS_ID, *b"xxx"]
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    new = ids[4:]
    expected = tokenizer.decode(new[: new.index(END_ID)] if END_ID in new else new, skip_special_tokens=True)
    assert answers["p0"][0].text == expected


def test_sampling_repeats_with_its_seed_and_differs_between_streams(tokenizer: Any) -> None:
    model = tiny_model()
    first = generate_answers(model, tokenizer, PROMPTS, sampled(), stream="a")
    assert first == generate_answers(model, tokenizer, PROMPTS, sampled(), stream="a")
    assert first != generate_answers(model, tokenizer, PROMPTS, sampled(), stream="b")
    assert first != generate_answers(model, tokenizer, PROMPTS, sampled(seed=1), stream="a")
    assert any(one != other for one, other in first.values())


def test_the_order_of_prompts_does_not_matter(tokenizer: Any) -> None:
    model = tiny_model()
    config = sampled(batch_size=3)
    first = generate_answers(model, tokenizer, PROMPTS, config, stream="a")
    assert first == generate_answers(model, tokenizer, PROMPTS[::-1], config, stream="a")


def test_a_batch_does_not_depend_on_the_batches_before_it(tokenizer: Any) -> None:
    model = tiny_model()
    config = sampled(samples=1, batch_size=1)
    everything = generate_answers(model, tokenizer, PROMPTS, config, stream="a")
    last_alone = generate_answers(model, tokenizer, [PROMPTS[1]], config, stream="a")
    assert last_alone["p1"] == everything["p1"]


def test_sampling_follows_the_models_distribution(tokenizer: Any) -> None:
    # A nearly even distribution over 260 tokens. What the model's own settings or transformers' default
    # (top_k 50) would cut off must come up: of 2,000 draws some 260 * (1 - exp(-7.7)) distinct tokens.
    model = tiny_model(initializer_range=0.02)
    model.generation_config.min_p = 0.9
    model.generation_config.top_k = 1
    config = sampled(prompts=1, samples=2000, max_new_tokens=1, batch_size=500)
    drawn = generate_answers(model, byte_tokenizer(template=None), [Prompt("p", "x")], config, stream="a")[
        "p"
    ]
    letters = [answer.text for answer in drawn if len(answer.text) == 1 and " " <= answer.text <= "~"]
    assert len(set(letters)) == 95
    with torch.no_grad():
        logits = model(torch.tensor([[BOS_ID, ord("x")]])).logits[0, -1]
    share = torch.softmax(logits, dim=-1)[ord(" ") : ord("~") + 1].double().numpy()
    counts = np.array([letters.count(chr(code)) for code in range(ord(" "), ord("~") + 1)])
    # Five standard deviations of a binomial count
    assert (np.abs(counts - 2000 * share) < 5 * np.sqrt(2000 * share * (1 - share))).all()
    assert (model.generation_config.min_p, model.generation_config.top_k) == (0.9, 1)


def test_temperature_and_nucleus_are_applied(tokenizer: Any) -> None:
    model = tiny_model()
    cold = sampled(samples=20, temperature=1e-4, max_new_tokens=4)
    narrow = sampled(samples=20, top_p=1e-6, max_new_tokens=4)
    likeliest = generate_answers(model, tokenizer, PROMPTS, greedy(max_new_tokens=4), stream="a")
    for config in (cold, narrow):
        answers = generate_answers(model, tokenizer, PROMPTS, config, stream="a")
        assert all(set(answers[name]) == set(likeliest[name]) for name in likeliest)


def test_tokens_are_counted_to_the_end_token_which_is_not_part(tokenizer: Any) -> None:
    answers = generate_answers(
        saying("hey", tokenizer, then=END_ID), tokenizer, PROMPTS[:2], greedy(), stream="a"
    )
    assert answers == {"p0": (Answer("hey", 3),), "p1": (Answer("hey", 3),)}


def test_an_answer_that_does_not_end_is_cut_at_the_longest(tokenizer: Any) -> None:
    model = saying("ab", tokenizer, then=ord("!"))
    answers = generate_answers(model, tokenizer, PROMPTS[:1], greedy(), stream="a")
    assert answers["p0"] == (Answer("ab!!!!", 6, ended=False),)


def test_a_chat_turn_ends_with_the_templates_token(tokenizer: Any) -> None:
    # Neither the model nor the tokenizer calls <|im_end|> the end of sequence here: the template does.
    tokenizer.eos_token = "<pad>"
    model = saying("ok", tokenizer, then=END_ID)
    answers = generate_answers(model, tokenizer, [Prompt("c", CHAT)], greedy(), stream="a")
    assert answers["c"] == (Answer("ok", 2),)


def test_messages_go_through_the_template_and_text_does_not(tokenizer: Any) -> None:
    assert encode_prompt(tokenizer, "hi") == [BOS_ID, *b"hi"]
    expected = [START_ID, *b"user\nhi", END_ID, *b"\n", START_ID, *b"assistant\n"]
    assert encode_prompt(tokenizer, CHAT) == expected
    assert encode_prompt(byte_tokenizer(bos=False), "hi") == [*b"hi"]
    system = [START_ID, *b"system\n", END_ID, *b"\n"]
    assert encode_prompt(tokenizer, CHAT, empty_system_message=True) == [*system, *expected]


def test_prompts_are_encoded_as_for_training(tokenizer: Any) -> None:
    pairs = [
        Pair("hi", "yes", "no", "p", "1"),
        Pair(
            CHAT,
            [{"role": "assistant", "content": "yes"}],
            [{"role": "assistant", "content": "no"}],
            "q",
            "2",
        ),
    ]
    for pair, tokens in zip(pairs, tokenize_pairs(pairs, tokenizer), strict=True):
        assert isinstance(tokens, PairTokens)
        assert encode_prompt(tokenizer, pair.prompt) == tokens.prompt_ids


def test_the_token_that_ends_a_turn(tokenizer: Any) -> None:
    assert turn_end_id(tokenizer) == END_ID
    assert turn_end_id(byte_tokenizer(template=None)) is None
    bare = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    assert turn_end_id(byte_tokenizer(template=bare)) is None


def test_messages_without_a_template_are_refused() -> None:
    with pytest.raises(TemplateError, match=r"set model\.chat_template"):
        encode_prompt(byte_tokenizer(template=None), CHAT)
    with pytest.raises(TemplateError, match="no system"):
        encode_prompt(byte_tokenizer(template="{{ raise_exception('no system') }}"), CHAT)


def test_mode_settings_and_random_state_are_left_as_they_were(tokenizer: Any) -> None:
    model = tiny_model().train()
    settings, side = model.generation_config, tokenizer.padding_side
    state = torch.random.get_rng_state()
    generate_answers(model, tokenizer, PROMPTS, sampled(), stream="a")
    assert model.training
    assert model.generation_config is settings
    assert tokenizer.padding_side == side
    assert torch.equal(torch.random.get_rng_state(), state)


# peft asks transformers for an attribute under its old name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapted_model_answers_and_keeps_its_settings(tokenizer: Any) -> None:
    base = tiny_model()
    plain = generate_answers(base, tokenizer, PROMPTS, greedy(), stream="a")
    settings = base.generation_config
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    # A fresh adapter is the identity
    assert generate_answers(adapted, tokenizer, PROMPTS, greedy(), stream="a") == plain
    assert adapted.get_base_model().generation_config is settings


def test_a_prompt_encoder_can_be_given(tokenizer: Any) -> None:
    model = tiny_model()

    def shout(text: Text) -> list[int]:
        return list(str(text).upper().encode())

    shouting = generate_answers(model, tokenizer, PROMPTS[:1], greedy(), stream="a", encode=shout)
    silent = byte_tokenizer(bos=False)
    expected = generate_answers(model, silent, [Prompt("p0", "XXX")], greedy(), stream="a")
    assert shouting == expected


def test_choice_of_prompts_is_distinct_seeded_and_independent_of_order() -> None:
    repeated = [*PROMPTS, *PROMPTS[::-1]]
    chosen = choose_prompts(repeated, sampled(prompts=3))
    assert len({prompt.prompt_id for prompt in chosen}) == 3
    assert chosen == choose_prompts(repeated[::-1], sampled(prompts=3))
    assert choose_prompts(PROMPTS, sampled(prompts=4))[:3] == chosen
    assert sorted(choose_prompts(PROMPTS, sampled(prompts=99))) == sorted(PROMPTS)
    assert len({tuple(choose_prompts(PROMPTS, sampled(seed=seed, prompts=5))) for seed in range(8)}) > 1


@pytest.mark.parametrize("changes", [{"samples": 2}, {"top_p": 0.9}])
def test_options_without_effect_are_refused(tokenizer: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="no effect at temperature 0"):
        generate_answers(tiny_model(), tokenizer, PROMPTS, greedy(**changes), stream="a")


def test_what_cannot_be_answered_is_refused(tokenizer: Any) -> None:
    model = tiny_model(max_position_embeddings=12)
    with pytest.raises(ModelError, match="lower max_new_tokens"):
        generate_answers(model, tokenizer, PROMPTS, greedy(), stream="a")
    with pytest.raises(IdentityError, match="p0"):
        generate_answers(model, tokenizer, [PROMPTS[0]] * 2, greedy(), stream="a")
    with pytest.raises(DataError, match="empty has no tokens"):
        generate_answers(model, byte_tokenizer(bos=False), [Prompt("empty", "")], greedy(), stream="a")
    assert generate_answers(model, tokenizer, [], greedy(), stream="a") == {}
