"""Chat templates: which one a tokenizer uses, and what it can do."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from selective_dpo.digests import digest
from selective_dpo.errors import ConfigError, TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMED_TEMPLATES = ("chatml", "gemma-system")
_MARKER = "system-text-marker"
_USER: dict[str, Any] = {"role": "user", "content": "text"}


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
            f"chat_template {name!r} is neither {' nor '.join(NAMED_TEMPLATES)} nor the path of a file"
        )
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"chat_template {name} is not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error


def apply_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Make `tokenizer` use the template `name` (see `load_template`); empty: it keeps its own.

    Raises:
        ConfigError: no such template.
        TemplateError: it is not valid Jinja.
    """
    if not name:
        return
    tokenizer.chat_template = load_template(name)
    try:
        tokenizer.apply_chat_template([_USER], tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"chat_template {name}, line {error.lineno}: {error.message}") from error
    except (SyntaxError, RecursionError, MemoryError) as error:
        # Jinja turns a template into Python code, which has limits of its own.
        raise TemplateError(
            f"chat_template {name} is too deep for Jinja: {error}; make it simpler"
        ) from error
    except Exception:
        pass  # It may refuse this conversation; whether it suits the data shows on the data.


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the template that `tokenizer` uses; of nothing, if it has none."""
    return digest(tokenizer.chat_template)


def mentions_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the text of a system message appears in what the template renders.

    Asked of the rendered text, not of the template: some name the role only to refuse it.
    """
    try:
        return _MARKER in render(tokenizer, [{"role": "system", "content": _MARKER}, _USER])
    except jinja2.TemplateError:
        return False


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
            "data.empty_system_message has no effect: the chat template takes no system message; remove it"
        )


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False
) -> str:
    """The text that the tokenizer's template makes of a conversation.

    Raises:
        jinja2.TemplateError: whatever went wrong in the template, or its text cannot be encoded.
    """
    try:
        text = str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
        text.encode("utf-8")
    except jinja2.TemplateError:
        raise
    except Exception as error:  # a template is a program: it can divide by zero, or add a text to a number
        raise jinja2.TemplateRuntimeError(f"{type(error).__name__}: {error}") from error
    return text
