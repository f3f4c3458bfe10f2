"""Chat templates: which one a tokenizer uses, what it can do, and the texts that it makes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2

from selective_dpo.config import NAMED_TEMPLATES
from selective_dpo.data.adapters import Messages
from selective_dpo.errors import ConfigError, RunawayTemplateError, SelectiveDPOError, TemplateError
from selective_dpo.storage.digests import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TEMPLATE_CHARACTERS = 1_000_000
"""Of a template's own text; those in use have fewer than 30,000."""

MAX_EXTRA_CHARACTERS = 1_000_000
"""Characters that a template may add to a conversation, besides `MAX_EXPANSION` for each that it has."""

MAX_EXPANSION = 16
"""Escaping makes up to six characters of one."""

_MARKER = "system-text-marker"

_USER: dict[str, Any] = {"role": "user", "content": "text"}

_NAME = "selective_dpo_template"
"""An attribute that `apply_template` sets on a tokenizer: the template's name, for messages."""


class Conversation(NamedTuple):
    """Messages to be rendered as one text."""

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
            return stream.read(MAX_TEMPLATE_CHARACTERS + 1)  # `render` refuses what is longer
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"chat_template {name} is not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error


def apply_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Make `tokenizer` use the template `name` (see `load_template`); empty: it keeps its own.

    Raises:
        ConfigError: no such template.
        TemplateError: it is not valid Jinja, or too long.
    """
    if not name:
        return
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer.chat_template = load_template(name)
    setattr(tokenizer, _NAME, name)
    _check_template_size(tokenizer)
    try:
        render_jinja_template([], chat_template=tokenizer.chat_template)  # compiles it, and renders nothing
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"chat_template {name}, line {error.lineno}: {error.message}") from error
    except SelectiveDPOError:
        raise
    except Exception as error:  # Jinja turns a template into Python code, which has limits of its own
        raise TemplateError(f"chat_template {name} cannot be compiled ({error}); simplify it") from error


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
    """The texts that the tokenizer's template makes of conversations, in transformers' sandbox.

    A template is a program, which may never end. Time is limited where data are prepared (see
    `prepare.prepare_pairs`), and not here.

    Raises:
        jinja2.TemplateError: the template raised an error, or wrote a text that cannot be encoded.
        RunawayTemplateError: the template is too long, writes too much or needs too much memory.
    """
    _check_template_size(tokenizer)
    texts: list[str] = []
    for messages, add_generation_prompt in conversations:
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
            _check_written(len(text), tokenizer, messages)
            str(text).encode("utf-8")
        except (jinja2.TemplateError, SelectiveDPOError):
            raise
        except MemoryError as error:
            raise runaway(tokenizer, "needs too much memory", messages) from error
        except Exception as error:  # it may divide by zero, or add a text to a number
            raise jinja2.TemplateRuntimeError(f"{type(error).__name__}: {error}") from error
        texts.append(str(text))
    return texts


def runaway(
    tokenizer: PreTrainedTokenizerBase, problem: str, messages: Messages | None = None
) -> RunawayTemplateError:
    """The error that says what a template does and, if known, on which conversation."""
    name = getattr(tokenizer, _NAME, "")
    template = f"chat_template {name}"
    if not name:
        template = f"the chat template of {tokenizer.name_or_path or 'the model'}"
    place = ""
    if messages:
        place = f", on the conversation that ends in {str(messages[-1].get('content'))[-40:]!r}"
    return RunawayTemplateError(f"{template} {problem}{place}; use another template")


def _check_template_size(tokenizer: PreTrainedTokenizerBase) -> None:
    template = tokenizer.chat_template
    if isinstance(template, str) and len(template) > MAX_TEMPLATE_CHARACTERS:
        raise runaway(tokenizer, f"has more than {MAX_TEMPLATE_CHARACTERS:,} characters")


def _check_written(characters: int, tokenizer: PreTrainedTokenizerBase, messages: Messages) -> None:
    if characters <= MAX_EXTRA_CHARACTERS:
        return
    given = sum(len(content) for message in messages if isinstance(content := message.get("content"), str))
    if characters > MAX_EXTRA_CHARACTERS + MAX_EXPANSION * given:
        raise runaway(tokenizer, f"writes {characters:,} characters for {given:,}", messages)
