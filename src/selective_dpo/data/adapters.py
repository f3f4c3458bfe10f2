"""Adapters: a function of one raw row that gives its preference pair, or the reason why there is none.

The adapter of sources that name no other, `read_pair`, understands these shapes (columns in brackets are
optional):

| shape | prompt | chosen, rejected |
| --- | --- | --- |
| explicit prompt, text | text | text |
| implicit prompt, text | - | texts that begin with the prompt |
| explicit prompt, chat | messages | messages |
| implicit prompt, chat | - | message lists that begin with the prompt |
| `ultrafeedback_binarized` | text | message lists that begin with the prompt |

[`prompt_id`], [`score_chosen`, `score_rejected`] or [`chosen_rating`, `rejected_rating`] go with any.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, NamedTuple

from selective_dpo import identity
from selective_dpo.errors import ConfigError, DataError, SelectiveDPOError
from selective_dpo.extensions import Registry, source_digest
from selective_dpo.identity import Text

KEPT = "kept"
"""The status of a row that is a usable pair; every other status is a `DropReason`."""

WANTED_COLUMNS = ("chosen", "rejected")
"""Without these two no row can be a pair; `prompt` may be part of them."""

COLUMNS = ("prompt", *WANTED_COLUMNS, "prompt_id", "score_chosen", "score_rejected")
"""What a source's `columns` can name for `read_pair`."""

ROLES = frozenset({"system", "user", "assistant", "tool"})

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

MAX_CHARACTERS = 8_000_000
"""Of prompt and completions together. A tokenizer needs some gigabytes and half a minute for as many."""

Messages = list[dict[str, Any]]


class DropReason(StrEnum):
    """Why a row is not used. Each dropped row has exactly one."""

    MALFORMED = "malformed"
    """A value is missing or of the wrong type, the line does not parse, or no tokenizer can encode it."""
    TOO_LARGE = "too large"
    """More than `MAX_CHARACTERS`; such a row is not even tokenized, and its texts are not kept."""
    TOOLS = "tools not supported"
    """A `tools` column that is not empty, or a message that calls tools: plain messages would lose both."""
    IMAGES = "images or parts not supported"
    """An `images` or `image` column that is not empty, or a message whose content is a list of parts."""
    IDENTICAL = "identical"
    """Chosen and rejected are the same: there is no preference."""
    SAME_BUT_SPACE = "same but for space at the ends"
    """Chosen and rejected differ only in white space at the ends of what they say: that is no preference."""
    EMPTY_PROMPT = "empty prompt"
    """The prompt is blank, or chosen and rejected have no beginning in common."""
    EMPTY_COMPLETION = "empty completion"
    """Chosen or rejected is blank after the prompt."""
    OTHERS_TURN = "another's turn in a completion"
    """Somebody else than the assistant speaks in a completion. DPO moves the log-probability of all of a
    completion's tokens, so it would train the policy to say, or not to say, the user's words. Several turns
    of the assistant alone are taken, whatever their number on each side."""
    ROLES_MISPLACED = "roles out of place"
    """A prompt with an unknown role or a late system message, or that ends with neither user nor tool."""
    DUPLICATE = "duplicate pair"
    """The same prompt, chosen and rejected stand in an earlier row."""
    IN_TRAINING_DATA = "in training data"
    """A test row whose prompt is one of the training pairs'."""
    EXCLUDED = "excluded"
    """Its id is among `data.exclude`."""
    ADAPTER = "left out by the adapter"
    """The source's own adapter has no use for this row."""
    NOT_SAMPLED = "not sampled"
    """Left out by `fraction` or `max_pairs`."""
    TEMPLATE_REFUSES = "refused by the template"
    """The chat template raised an error for this conversation."""
    PROMPT_TOO_LONG = "prompt too long"
    """More than `max_prompt_length` tokens."""
    TOO_LONG = "too long"
    """Prompt plus the longer completion has more than `max_length` tokens."""
    IDENTICAL_TRUNCATED = "identical after truncation"
    """The completions differ only in tokens that truncation cut off."""


class Pair(NamedTuple):
    """A prompt and its two completions: all three text, or all three messages."""

    prompt: Text
    chosen: Text
    rejected: Text
    prompt_id: str
    """The data's own where it can be one (short text without NUL), else made from the prompt's content."""
    pair_id: str
    score_chosen: float | None = None
    score_rejected: float | None = None

    @property
    def is_conversational(self) -> bool:
        """Whether the pair is messages, which a chat template turns into text."""
        return not isinstance(self.prompt, str)


_Parts = tuple[Text, Text, Text]
"""Prompt, chosen and rejected."""

Adapter = Callable[[Mapping[str, Any]], Pair | DropReason]
"""One raw row -> its pair, or why it is not used."""


def _require_function(name: str, function: Any) -> Adapter:
    if not callable(function):
        raise ConfigError(f"adapter {name!r} is no function of a row")
    result: Adapter = function
    return result


ADAPTERS: Registry[Adapter] = Registry("adapter", _require_function)
"""A source's `adapter` -> the function."""


def adapter(name: str) -> Callable[[Adapter], Adapter]:
    """Register the decorated function as a source's `adapter: NAME`.

    It gets a row as the file has it, after the source's `columns`, and returns a `Pair` or a `DropReason`;
    `read_pair` makes either of a dictionary with prompt, chosen and rejected. It must decide by the row
    alone. Its pairs are checked as all others are.
    """

    def register(function: Adapter) -> Adapter:
        ADAPTERS[name] = function
        return function

    return register


def adapter_digest(name: str) -> str:
    """SHA-256 of the file that a source's own adapter stands in, for content keys; empty for no name.

    Raises:
        ConfigError: there is no such adapter, or its source cannot be read.
    """
    return source_digest(ADAPTERS[name]) if name else ""


def find_adapter(name: str) -> Adapter:
    """The function of a source's `adapter`, its pairs' ids and types made sure of; `read_pair` for no name.

    Raises:
        ConfigError: there is no such adapter.
        DataError: by the function that is returned, where the user's raises an error or returns no pair.
    """
    if not name:
        return read_pair
    function = ADAPTERS[name]

    def adapt(raw: Mapping[str, Any]) -> Pair | DropReason:
        try:
            made = function(raw)
            if not isinstance(made, Pair | DropReason):
                raise TypeError(f"{type(made).__name__} is neither Pair nor DropReason")
        except SelectiveDPOError:
            raise
        except Exception as error:
            raise DataError(
                f"adapter {name}: {type(error).__name__}: {error}; mend it, or return a DropReason here"
            ) from error
        return made if isinstance(made, DropReason) else read_pair(made._asdict())

    return adapt


def parse_row(raw: Mapping[str, Any], adapter: Adapter | None = None) -> Pair | DropReason:
    """The pair in a raw row, or why the row cannot be used; `read_pair` is the adapter if None is given."""
    pair = (adapter or read_pair)(raw)
    return pair if isinstance(pair, DropReason) else fault_of(pair) or pair


def read_pair(raw: Mapping[str, Any]) -> Pair | DropReason:
    """Prompt, completions and ids of a row whose values have the right types, good to learn from or not.

    It raises nothing, whatever the row holds.
    """
    parts = _read_parts(raw)
    if isinstance(parts, DropReason):
        return parts
    if sum(map(text_size, parts)) > MAX_CHARACTERS:
        return DropReason.TOO_LARGE
    own_id = raw.get("prompt_id")
    has_own_id = isinstance(own_id, str) and _is_id(own_id)
    return Pair(
        *parts,
        prompt_id=str(own_id) if has_own_id else identity.prompt_id(parts[0]),
        pair_id=identity.pair_id(*parts),
        score_chosen=_score(raw, "score_chosen", "chosen_rating"),
        score_rejected=_score(raw, "score_rejected", "rejected_rating"),
    )


CHAT = "chat"
"""The adapter of texts that are meant as messages, such as a CSV file's for a model with a chat template."""


def as_chat(pair: Pair) -> Pair:
    """A pair of texts as a user's message and two of the assistant's; one of messages as it is."""
    if pair.is_conversational:
        return pair
    user, *answers = (
        [{"role": role, "content": text}]
        for role, text in (("user", pair.prompt), ("assistant", pair.chosen), ("assistant", pair.rejected))
    )
    raw = {**pair._asdict(), "prompt": user, "chosen": answers[0], "rejected": answers[1]}
    made = read_pair(raw)
    return made if isinstance(made, Pair) else pair


@adapter(CHAT)
def _read_chat(raw: Mapping[str, Any]) -> Pair | DropReason:
    pair = read_pair(raw)
    return pair if isinstance(pair, DropReason) else as_chat(pair)


def fault_of(pair: Pair) -> DropReason | None:
    """What is wrong with a pair's content, if anything; lengths are another matter (see `tokenize`)."""
    chosen_texts, rejected_texts = contents_of(pair.chosen), contents_of(pair.rejected)
    if not all(map(is_encodable, contents_of(pair.prompt) + chosen_texts + rejected_texts)):
        return DropReason.MALFORMED
    if pair.chosen == pair.rejected:
        return DropReason.IDENTICAL
    if all(map(_is_blank, contents_of(pair.prompt, skip_system=True))):
        return DropReason.EMPTY_PROMPT
    if all(map(_is_blank, chosen_texts)) or all(map(_is_blank, rejected_texts)):
        return DropReason.EMPTY_COMPLETION
    if not isinstance(pair.prompt, str) and not _is_prompt(pair.prompt):
        return DropReason.ROLES_MISPLACED
    if _speakers(pair, pair.chosen) | _speakers(pair, pair.rejected) != {"assistant"}:
        return DropReason.OTHERS_TURN
    if [text.strip() for text in chosen_texts] == [text.strip() for text in rejected_texts]:
        return DropReason.SAME_BUT_SPACE
    return None


def text_size(text: Text) -> int:
    """Characters of a text, or of what its messages say."""
    return sum(map(len, contents_of(text)))


def _read_parts(raw: Mapping[str, Any]) -> _Parts | DropReason:
    if str(raw.get("tools") or "[]") != "[]":  # TRL takes a list, and its JSON
        return DropReason.TOOLS
    if raw.get("images") or raw.get("image"):
        return DropReason.IMAGES
    chosen, rejected = raw.get("chosen"), raw.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if "prompt" not in raw:
            return _split_texts(chosen, rejected)
        prompt = raw["prompt"]
        return (prompt, chosen, rejected) if isinstance(prompt, str) else DropReason.MALFORMED
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _read_conversations(raw, chosen, rejected)
    return DropReason.MALFORMED


def _read_conversations(
    raw: Mapping[str, Any], raw_chosen: list[Any], raw_rejected: list[Any]
) -> _Parts | DropReason:
    # Every chat shape is brought to one: two whole conversations, which are then split.
    chosen = read_messages(raw_chosen)
    if isinstance(chosen, DropReason):
        return chosen
    rejected = read_messages(raw_rejected)
    if isinstance(rejected, DropReason):
        return rejected
    if "prompt" not in raw:
        return _split_conversations(chosen, rejected)
    prompt = raw["prompt"]
    if isinstance(prompt, str):
        # A text prompt repeats the first user message, unless the lists hold nothing but the answers.
        only_answers = all(part and part[0]["role"] == "assistant" for part in (chosen, rejected))
        opening: Messages = [{"role": "user", "content": prompt}] if only_answers else []
        return _split_conversations(opening + chosen, opening + rejected)
    if not isinstance(prompt, list):
        return DropReason.MALFORMED
    shared = read_messages(prompt)
    if isinstance(shared, DropReason):
        return shared
    are_whole = all(part[: len(shared)] == shared for part in (chosen, rejected))
    return _split_conversations(*((chosen, rejected) if are_whole else (shared + chosen, shared + rejected)))


def read_messages(raw: list[Any]) -> Messages | DropReason:
    """Role and content of each message, or why a row with such messages cannot be used."""
    messages: Messages = []
    for message in raw:
        if not isinstance(message, Mapping):
            return DropReason.MALFORMED
        if message.get("tool_calls"):
            return DropReason.TOOLS
        if isinstance(message.get("content"), list):
            return DropReason.IMAGES
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            return DropReason.MALFORMED
        messages.append({"role": role, "content": content})
    return messages


def _split_conversations(chosen: Messages, rejected: Messages) -> _Parts:
    # The longest common prefix, less assistant messages at its end: the assistant's words are completion
    # even where both sides begin alike, and an identical pair keeps a prompt.
    shared = _common_length(chosen, rejected)
    while shared and chosen[shared - 1]["role"] == "assistant":
        shared -= 1
    return (chosen[:shared], chosen[shared:], rejected[shared:])


def _split_texts(chosen: str, rejected: str) -> _Parts:
    shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 (it is text, not paths)
    turn = shared.rfind(_ASSISTANT)
    if turn >= 0:
        end = turn + len(_ASSISTANT)
    elif chosen.startswith(_HUMAN):
        end = 0  # A dialogue that parts before the assistant has spoken: no common prompt.
    else:
        end = _end_of_last_space(shared)
    return (chosen[:end], chosen[end:], rejected[end:])


def _end_of_last_space(text: str) -> int:
    # Words are not split. One space goes to the completion, as most tokenizers join it to the next word;
    # a line break stays with the prompt.
    end = next((index for index in range(len(text), 0, -1) if text[index - 1].isspace()), 0)
    return end - 1 if text[:end].endswith(" ") else end


def _common_length(left: Messages, right: Messages) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(left), len(right)))


def _is_prompt(messages: Messages) -> bool:
    roles = [message["role"] for message in messages]
    return set(roles) <= ROLES and "system" not in roles[1:] and roles[-1] in ("user", "tool")


def _speakers(pair: Pair, completion: Text) -> set[str]:
    if not isinstance(completion, str):
        return {str(message["role"]) for message in completion}
    # Plain text has turns only where its prompt is a dialogue in the form of the HH data.
    is_dialogue = isinstance(pair.prompt, str) and pair.prompt.rstrip().endswith(_ASSISTANT)
    return {"assistant", "user"} if is_dialogue and _HUMAN in completion else {"assistant"}


def contents_of(text: Text, *, skip_system: bool = False) -> list[str]:
    """The text, or what each of its messages says."""
    if isinstance(text, str):
        return [text]
    return [message["content"] for message in text if not (skip_system and message["role"] == "system")]


def _is_blank(text: str) -> bool:
    return not text or text.isspace()


def is_encodable(text: str) -> bool:
    """Whether text has tokens: a lone surrogate (half of a character, from a broken escape) has no UTF-8."""
    if text.isascii():
        return True  # known without a look at it
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_id(text: str) -> bool:
    # What cannot be an id in a table (see `identity.MAX_ID_BYTES`) is no reason to drop the pair.
    return is_encodable(text) and "\0" not in text and 0 < len(text.encode("utf-8")) <= identity.MAX_ID_BYTES


def _score(raw: Mapping[str, Any], *columns: str) -> float | None:
    for column in columns:
        try:
            score = float(raw[column])
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
        if math.isfinite(score):
            return score
    return None
