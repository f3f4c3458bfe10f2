"""Chat templates: which one a tokenizer uses, and what it can do."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2

from selective_dpo.config import NAMED_TEMPLATES
from selective_dpo.data.pairs import Messages
from selective_dpo.data.render_limits import (
    MOST_TEMPLATE,
    check_template_size,
    check_written,
    within_limits,
)
from selective_dpo.digests import digest
from selective_dpo.errors import ConfigError, RunawayTemplateError, SelectiveDPOError, TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKER = "system-text-marker"
_USER: dict[str, Any] = {"role": "user", "content": "text"}
_NAME = "selective_dpo_template"
"""An attribute of tokenizers that `apply_template` has changed: the template's name."""


class Conversation(NamedTuple):
    """What a template makes a text of."""

    messages: Messages
    add_generation_prompt: bool = False
    """Whether the beginning of an answer is written after the messages."""


def load_template(name: str) -> str:
    """The text of a named template, or of the Jinja file at the path `name`.

    Raises:
        ConfigError: neither a known name nor a file.
    """
    if name in NAMED_TEMPLATES:
        return (resources.files(__package__) / "templates" / f"{name}.jinja").read_text("utf-8")
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"chat_template {name!r} is none of {', '.join(NAMED_TEMPLATES)} nor the path of a file"
        )
    try:
        with path.open(encoding="utf-8") as stream:
            return stream.read(MOST_TEMPLATE + 1)  # `render` refuses what is longer
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"chat_template {name} is not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error


def apply_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Make `tokenizer` use the template `name` (see `load_template`); empty: it keeps its own.

    Raises:
        ConfigError: no such template.
        TemplateError: it is not valid Jinja, or does not end on a word.
    """
    if not name:
        return
    tokenizer.chat_template = load_template(name)
    setattr(tokenizer, _NAME, name)
    try:
        _render_each(tokenizer, [Conversation([_USER])])
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"chat_template {name}, line {error.lineno}: {error.message}") from error
    except (SyntaxError, RecursionError) as error:
        # Jinja turns a template into Python code, which has limits of its own.
        raise TemplateError(f"chat_template {name} is too deep for Jinja: {error}; simplify it") from error
    except SelectiveDPOError:
        raise
    except Exception:
        pass  # It may refuse this conversation; whether it suits the data shows on the data.


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the template that `tokenizer` uses; of nothing, if it has none."""
    return digest(tokenizer.chat_template)


def mentions_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template was made for system messages, so that an empty one can be put before a prompt.

    Its own text must mention them, or be ChatML: the rule of the alignment handbook, with which the original
    ran. A template that writes whatever role it is given, as Llama-3's do, mentions none, and its model has
    seen none. What it renders must hold the message as well: some name the role only to refuse it.
    """
    try:
        (rendered,) = render(tokenizer, [Conversation([{"role": "system", "content": _MARKER}, _USER])])
    except jinja2.TemplateError:
        return False
    text = tokenizer.get_chat_template()
    return _MARKER in rendered and ("system" in text or "<|im_start|>" in text)


def require_template(tokenizer: PreTrainedTokenizerBase, *, empty_system_message: bool) -> None:
    """Check that conversations can be rendered as the recipe asks.

    Raises:
        TemplateError: the tokenizer has no chat template.
        ConfigError: an empty system message is asked for, and the template takes none.
    """
    if not tokenizer.chat_template:
        raise TemplateError(
            "the data are conversations and the tokenizer has no chat template; set model.chat_template to "
            f"{', '.join(NAMED_TEMPLATES)} or the path of a Jinja file"
        )
    if empty_system_message and not mentions_system(tokenizer):
        raise ConfigError(
            "data.empty_system_message has no effect: the chat template mentions no system message (or takes "
            "none); remove it"
        )


def render(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> list[str]:
    """The texts that the tokenizer's template makes of conversations, together within `render_limits`.

    Raises:
        jinja2.TemplateError: whatever went wrong in the template, or a text cannot be encoded.
        RunawayTemplateError: it takes too long, needs too much memory or writes too much.
    """
    try:
        texts = _render_each(tokenizer, conversations)
        for text in texts:
            text.encode("utf-8")
    except (jinja2.TemplateError, SelectiveDPOError):
        raise
    except Exception as error:  # a template is a program: it can divide by zero, or add a text to a number
        raise jinja2.TemplateRuntimeError(f"{type(error).__name__}: {error}") from error
    return texts


def _render_each(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> list[str]:
    """What transformers' sandbox makes of conversations; an error of the template's is raised as it is."""
    texts: list[str] = []
    messages: Messages = []

    def work() -> list[str]:
        nonlocal messages
        for messages, add_generation_prompt in conversations:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
            check_written(len(text), messages)
            texts.append(str(text))
        return texts

    try:
        check_template_size(tokenizer.chat_template)
        return within_limits(work)
    except RunawayTemplateError as error:
        raise RunawayTemplateError(
            f"{_name(tokenizer)} {error}{_place(messages)}; use another template"
        ) from None


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    name = getattr(tokenizer, _NAME, "")
    if name:
        return f"chat_template {name}"
    return f"the chat template of {tokenizer.name_or_path or 'the model'}"


def _place(messages: Messages) -> str:
    if not messages:
        return ""
    return f", on the conversation that ends in {str(messages[-1].get('content'))[-40:]!r}"
