"""A file of prompts to be answered, without completions."""

from __future__ import annotations

from pathlib import Path

from selective_dpo.core.identity import Text
from selective_dpo.data.pairs import (
    MOST_CHARACTERS,
    DropReason,
    contents_of,
    is_encodable,
    read_messages,
    text_size,
)
from selective_dpo.data.readers import Malformed, Row, read_file
from selective_dpo.errors import DataError


def read_prompts(path: Path) -> list[Text]:
    """The column `prompt` of each row, text or messages; of these only role and content.

    Raises:
        DataError: the file cannot be read, or a row of it has no prompt that can be asked; it is named.
    """
    return [_prompt(row, f"{path}, row {number:,}") for number, row in enumerate(read_file(path))]


def _prompt(row: Row, where: str) -> Text:
    value = None if isinstance(row, Malformed) else row.get("prompt")
    prompt = read_messages(value) if isinstance(value, list) and value else value
    if isinstance(prompt, DropReason) or not prompt or not isinstance(prompt, (str, list)):
        raise DataError(f"{where}: needs a prompt, as text or as messages of role and content")
    if text_size(prompt) > MOST_CHARACTERS:
        raise DataError(f"{where}: the prompt has more than {MOST_CHARACTERS:,} characters; leave it out")
    if not all(map(is_encodable, contents_of(prompt))):
        raise DataError(f"{where}: the prompt holds half of a character (a lone surrogate); mend the row")
    return prompt
