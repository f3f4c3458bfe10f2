"""The user's texts made ready to be shown: nothing that breaks a page or a terminal, no endless answer."""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

from selective_dpo.core.identity import Text
from selective_dpo.digests import canonical_json

LONGEST_SHOWN = 1500
_LONGEST_PREVIEW = 160
_REPLACEMENT = "\ufffd"


class Turn(NamedTuple):
    """One message as it is shown. `role` is empty for plain text."""

    role: str
    text: str
    cut: int
    """Characters of the message that are left out at its end."""


def printable(text: str) -> str:
    """`text` with control characters and lone surrogates, but for line breaks and tabs, as U+FFFD."""
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs")
        else _REPLACEMENT
        for character in text.replace("\r\n", "\n")
    )


def turns(text: Text) -> tuple[Turn, ...]:
    """The messages of `text`, each cut after `LONGEST_SHOWN` characters; plain text is one of them."""
    if isinstance(text, str):
        return (_turn("", text),)
    return tuple(_turn(str(message.get("role", "")), message.get("content")) for message in text)


def preview(text: Text) -> str:
    """The beginning of `text`, or of its last message, on one line."""
    last = text if isinstance(text, str) else (text[-1].get("content") if text else "")
    return " ".join(_turn("", last).text[:_LONGEST_PREVIEW].split())


def _turn(role: str, content: object) -> Turn:
    # Content that is not a string (parts, tool calls) is shown as the JSON that it is.
    text = content if isinstance(content, str) else canonical_json(content)
    return Turn(printable(role), printable(text[:LONGEST_SHOWN]), max(0, len(text) - LONGEST_SHOWN))
