"""From a prompt to the tokens that a model continues."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jinja2

from selective_dpo.core.identity import Text
from selective_dpo.data.templates import Conversation, render
from selective_dpo.data.tokenize import with_system
from selective_dpo.errors import RunawayTemplateError, TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, text: Text, *, empty_system_message: bool = False
) -> list[int]:
    """Token ids of a prompt, up to where the answer starts; the same as those of a training pair's prompt.

    Messages go through the chat template, with an empty system message first if they have none and
    `empty_system_message`; plain text goes through the tokenizer alone.

    Raises:
        TemplateError: messages, and the tokenizer has no chat template or the template refuses them.
        RunawayTemplateError: it takes too long or writes too much.
    """
    if isinstance(text, str):
        return list(tokenizer(text)["input_ids"])
    messages = with_system(text) if empty_system_message else text
    return encode_conversation(tokenizer, Conversation(messages, add_generation_prompt=True))


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts after an assistant's answer; None if it has none.

    Templates of fine-tuned models often end a turn with another token than the base model's end of
    sequence; a model trained on such turns stops with that one.
    """
    question = [{"role": "user", "content": "a"}]
    try:
        before = encode_conversation(tokenizer, Conversation(question, add_generation_prompt=True))
        answered = Conversation([*question, {"role": "assistant", "content": "b"}])
        whole = encode_conversation(tokenizer, answered)
    except RunawayTemplateError:
        raise
    except TemplateError:
        return None
    if whole[: len(before)] != before:
        return None
    special = set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    return next((token for token in whole[len(before) :] if token in special), None)


def encode_conversation(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[int]:
    """Token ids of what the chat template writes, and of nothing else: no second beginning of sequence.

    Raises:
        TemplateError, RunawayTemplateError: see `encode_prompt`.
    """
    if not tokenizer.chat_template:
        raise TemplateError(
            "prompts are chat messages and the tokenizer has no template: set model.chat_template"
        )
    try:
        (text,) = render(tokenizer, [conversation])
    except jinja2.TemplateError as error:
        raise TemplateError(
            f"the chat template refuses a prompt: {error}; choose model.chat_template"
        ) from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
