"""The user's texts made ready to be shown: nothing that breaks a page or a terminal, no endless answer."""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

from selective_dpo.core.identity import Text
from selective_dpo.digests import canonical_json

LONGEST_SHOWN = 1500
_LONGEST_PREVIEW = 160
_REPLACEMENT = "\ufffd"
# They turn the direction of what follows, so that a text could show otherwise than it is.
_DIRECTION_MARKS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Turn(NamedTuple):
    """One message as it is shown. `role` is empty for plain text."""

    role: str
    text: str
    cut: int
    """Characters of the message that are left out at its end."""


def printable(text: str) -> str:
    """`text` with U+FFFD for control characters other than line breaks and tabs, lone surrogates, and marks
    that turn the direction of writing."""
    return "".join(
        character
        if character in "\n\t"
        or (unicodedata.category(character) not in ("Cc", "Cs") and character not in _DIRECTION_MARKS)
        else _REPLACEMENT
        for character in text.replace("\r\n", "\n")
    )


def turns(text: Text, longest: int | None = LONGEST_SHOWN) -> tuple[Turn, ...]:
    """The messages of `text`, each cut after `longest` characters (None: whole); plain text is one."""
    if isinstance(text, str):
        return (_turn("", text, longest),)
    return tuple(_turn(str(message.get("role", "")), message.get("content"), longest) for message in text)


def preview(text: Text) -> str:
    """The beginning of `text`, or of its last message, on one line."""
    last = text if isinstance(text, str) else (text[-1].get("content") if text else "")
    return " ".join(_turn("", last, LONGEST_SHOWN).text[:_LONGEST_PREVIEW].split())


def _turn(role: str, content: object, longest: int | None) -> Turn:
    # Content that is not a string (parts, tool calls) is shown as the JSON that it is.
    text = content if isinstance(content, str) else canonical_json(content)
    shown = text[:longest]
    return Turn(printable(role), printable(shown), len(text) - len(shown))
