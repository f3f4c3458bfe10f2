"""From a prompt to the tokens that a model continues."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from selective_dpo.core.identity import Text
from selective_dpo.data.tokenize import with_system
from selective_dpo.errors import TemplateError

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
    """
    if isinstance(text, str):
        return list(tokenizer(text)["input_ids"])
    messages = with_system(text) if empty_system_message else text
    return _render(tokenizer, messages, add_generation_prompt=True)


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts after an assistant's answer; None if it has none.

    Templates of fine-tuned models often end a turn with another token than the base model's end of
    sequence; a model trained on such turns stops with that one.
    """
    question = [{"role": "user", "content": "a"}]
    try:
        before = _render(tokenizer, question, add_generation_prompt=True)
        whole = _render(tokenizer, [*question, {"role": "assistant", "content": "b"}])
    except TemplateError:
        return None
    if whole[: len(before)] != before:
        return None
    special = set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    return next((token for token in whole[len(before) :] if token in special), None)


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False
) -> list[int]:
    if not tokenizer.chat_template:
        raise TemplateError(
            "prompts are chat messages and the tokenizer has no template: set model.chat_template"
        )
    try:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
        )
    except Exception as error:  # a template is a program, and may raise anything
        raise TemplateError(
            f"the chat template refuses a prompt: {error}; choose model.chat_template"
        ) from error
    return list(ids)
