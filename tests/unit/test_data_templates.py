"""The shipped chat templates write the turns they say, and what a template can do is found by asking it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from selective_dpo.data.adapters import Pair, parse_row
from selective_dpo.data.templates import (
    apply_template,
    load_template,
    mentions_system,
    require_template,
    template_digest,
)
from selective_dpo.data.tokenize import PairTokens, tokenize_pairs
from selective_dpo.errors import ConfigError, TemplateError
from selective_dpo.evaluation.generate import encode_prompt
from tests.fixtures.tokenizers import BOS_ID, byte_tokenizer

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Bye"},
]


def rendered(name: str, messages: list[dict[str, Any]], *, bos: bool = True, prompt: bool = True) -> str:
    tokenizer = byte_tokenizer(bos=bos, template=None)
    apply_template(tokenizer, name)
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))


def test_chatml() -> None:
    assert rendered("chatml", CONVERSATION) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered("chatml", CONVERSATION[1:2], prompt=False) == "<|im_start|>user\nHello<|im_end|>\n"


def test_gemma_puts_the_system_text_before_the_first_user_message() -> None:
    turns = (
        "<start_of_turn>model\nHi<end_of_turn>\n<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    )
    with_system = f"<start_of_turn>user\nBe brief.\n\nHello<end_of_turn>\n{turns}"
    assert rendered("gemma-system", CONVERSATION) == "<s>" + with_system
    assert rendered("gemma-system", CONVERSATION, bos=False) == with_system
    without_system = f"<s><start_of_turn>user\nHello<end_of_turn>\n{turns}"
    assert rendered("gemma-system", CONVERSATION[1:]) == without_system
    empty = [{"role": "system", "content": ""}, *CONVERSATION[1:]]
    assert rendered("gemma-system", empty) == without_system


def test_zephyr_is_written_after_a_beginning_of_sequence() -> None:
    # The byte tokenizer's end of sequence is <|im_end|>; Mistral's is </s>.
    opening = "<|system|>\nBe brief.<|im_end|>\n<|user|>\nHello<|im_end|>\n"
    answered = f"{opening}<|assistant|>\nHi<|im_end|>\n"
    whole = f"{answered}<|user|>\nBye<|im_end|>\n<|assistant|>\n"
    assert rendered("zephyr", CONVERSATION) == "<s>" + whole
    assert rendered("zephyr", CONVERSATION, bos=False) == whole
    assert rendered("zephyr", CONVERSATION[:3], prompt=False) == "<s>" + answered
    tokenizer = byte_tokenizer()
    apply_template(tokenizer, "zephyr")
    pair = parse_row(
        {"chosen": CONVERSATION[1:3], "rejected": [CONVERSATION[1], {**CONVERSATION[2], "content": "Ho"}]}
    )
    assert isinstance(pair, Pair)
    (tokens,) = tokenize_pairs([pair], tokenizer, empty_system_message=True)
    assert isinstance(tokens, PairTokens)
    text = "<|system|>\n<|im_end|>\n<|user|>\nHello<|im_end|>\n<|assistant|>\n"
    by_hand = [BOS_ID, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert tokens.prompt_ids == by_hand
    assert encode_prompt(tokenizer, pair.prompt, empty_system_message=True) == by_hand


def test_an_own_template_file(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{% for message in messages %}[{{ message.content }}]{% endfor %}")
    assert rendered(str(path), CONVERSATION) == "[Be brief.][Hello][Hi][Bye]"
    path.write_text("{% for message in messages %}")
    with pytest.raises(TemplateError, match="line 1"):
        rendered(str(path), CONVERSATION)
    with pytest.raises(ConfigError, match="none of chatml, gemma-system, zephyr nor the path"):
        load_template("alpaca")


def test_no_name_keeps_the_tokenizers_own() -> None:
    tokenizer = byte_tokenizer()
    before = template_digest(tokenizer)
    apply_template(tokenizer, "")
    assert template_digest(tokenizer) == before
    apply_template(tokenizer, "gemma-system")
    assert template_digest(tokenizer) != before


@pytest.mark.parametrize(
    ("template", "takes_one"),
    [
        (load_template("chatml"), True),
        (load_template("gemma-system"), True),
        (load_template("zephyr"), True),
        # It writes whatever role it is given, and mentions none that it was made for.
        ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", False),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", False),
        # It names the role, to refuse it.
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}", False),
    ],
    ids=["chatml", "gemma", "zephyr", "any role", "silent", "refuses"],
)
def test_whether_a_template_takes_a_system_message(template: str, takes_one: bool) -> None:
    tokenizer = byte_tokenizer(template=template)
    assert mentions_system(tokenizer) is takes_one
    require_template(tokenizer, empty_system_message=False)
    if not takes_one:
        with pytest.raises(ConfigError, match="empty_system_message has no effect"):
            require_template(tokenizer, empty_system_message=True)


def test_conversations_need_a_template() -> None:
    with pytest.raises(TemplateError, match=r"set model\.chat_template"):
        require_template(byte_tokenizer(template=None), empty_system_message=False)
