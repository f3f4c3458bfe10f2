"""Pairs -> token ids: the same ids as TRL's `DPOTrainer` makes, plus a decision on lengths.

The boundary between prompt and completion is found on tokens, as TRL finds it: where the tokens of the
prompt alone part from those of prompt plus completion, for either completion. Tokens may merge across the
boundary, or a template may write a prompt differently when it stands alone; then the boundary falls before
the prompt's end (`boundary_mismatch`), and the few tokens between belong to the completion.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2

from selective_dpo.config import DataConfig
from selective_dpo.data.adapters import DropReason, Messages, Pair
from selective_dpo.data.templates import Conversation, render, require_template
from selective_dpo.errors import ModelError, RunawayTemplateError
from selective_dpo.storage.digests import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PairTokens(NamedTuple):
    """A pair as token ids. The model's inputs are prompt + chosen and prompt + rejected."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    boundary_mismatch: bool = False
    """The prompt's own tokens are not a prefix of prompt plus completion."""
    truncated: bool = False


class Fitted(NamedTuple):
    """A pair after the decision on its length."""

    tokens: PairTokens
    drop: DropReason | None


def tokenize_pairs(
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    empty_system_message: bool = False,
    places: Sequence[str] | None = None,
) -> list[PairTokens | DropReason]:
    """The tokens of each pair, in the order of `pairs`; a reason where the chat template refuses one.

    Text gets the tokenizer's special tokens, and its end-of-sequence token after a completion that does not
    end with it. Conversations get what the template writes and nothing else, so no second BOS.

    Raises:
        TemplateError: conversations, and no chat template.
        RunawayTemplateError: the template writes or needs too much; it names the pair's item of `places`.
        ConfigError: `empty_system_message`, and the template takes none.
        ModelError: text, and the tokenizer has no end-of-sequence token.
    """
    if any(pair.is_conversational for pair in pairs):
        require_template(tokenizer, empty_system_message=empty_system_message)
    texts: dict[int, list[str]] = {}
    for index, pair in enumerate(pairs):
        try:
            rendered = render_pair(pair, tokenizer, empty_system_message=empty_system_message)
        except RunawayTemplateError as error:
            raise RunawayTemplateError(f"{places[index]}: {error}" if places else str(error)) from error
        if rendered is not None:
            texts[index] = rendered
    results: list[PairTokens | DropReason] = [DropReason.TEMPLATE_REFUSES] * len(pairs)
    for is_chat in (True, False):
        positions = [index for index in texts if pairs[index].is_conversational is is_chat]
        encoded = _encode([texts[index] for index in positions], tokenizer, add_special_tokens=not is_chat)
        for index, tokens in zip(positions, encoded, strict=True):
            results[index] = tokens
    return results


def render_pair(
    pair: Pair, tokenizer: PreTrainedTokenizerBase, *, empty_system_message: bool
) -> list[str] | None:
    """The texts of prompt, prompt + chosen and prompt + rejected; None where the chat template refuses one.

    Raises:
        RunawayTemplateError: see `templates.render`.
        ModelError: text, and the tokenizer has no end-of-sequence token.
    """
    if isinstance(pair.prompt, str):
        end, completions = _end_of_sequence(tokenizer), (str(pair.chosen), str(pair.rejected))
        ended = [text if text.endswith(end) else text + end for text in completions]
        return [pair.prompt, *(pair.prompt + text for text in ended)]
    # `read_pair` allows only parts of one kind; this tells the type checker.
    assert isinstance(pair.chosen, list) and isinstance(pair.rejected, list)
    prompt = with_system(pair.prompt) if empty_system_message else pair.prompt
    conversations = [Conversation(prompt, add_generation_prompt=True)]
    conversations += [Conversation(prompt + completion) for completion in (pair.chosen, pair.rejected)]
    try:
        return render(tokenizer, conversations)
    except jinja2.TemplateError:
        return None


def fit_length(tokens: PairTokens, config: DataConfig) -> Fitted:
    """Apply the length limits to one pair.

    `drop`: a prompt above `max_prompt_length` goes, even if the whole would fit, and so does a pair whose
    prompt plus longer completion is above `max_length`. `truncate` is TRL 0.11.4's rule, which the original
    ran with: only a pair above `max_length` changes. Its prompt keeps its last `max_prompt_length` tokens (so
    a BOS or system message may go). If that is not enough, each completion keeps its first `max_length -
    max_prompt_length` tokens, however short the prompt is. Either way a pair needs a token of prompt and of
    each completion, and completions that differ.
    """
    prompt, chosen, rejected = tokens.prompt_ids, tokens.chosen_ids, tokens.rejected_ids
    problems = [
        (not prompt, DropReason.EMPTY_PROMPT),
        (not chosen or not rejected, DropReason.EMPTY_COMPLETION),
        (chosen == rejected, DropReason.IDENTICAL),
    ]
    for has_problem, reason in problems:
        if has_problem:
            return Fitted(tokens, reason)
    length = len(prompt) + max(len(chosen), len(rejected))
    if config.overlong == "drop":
        if len(prompt) > config.max_prompt_length:
            return Fitted(tokens, DropReason.PROMPT_TOO_LONG)
        return Fitted(tokens, DropReason.TOO_LONG if length > config.max_length else None)
    if length <= config.max_length:
        return Fitted(tokens, None)
    prompt = prompt[-config.max_prompt_length :]
    if len(prompt) + max(len(chosen), len(rejected)) > config.max_length:
        limit = config.max_length - config.max_prompt_length
        chosen, rejected = chosen[:limit], rejected[:limit]
    cut = PairTokens(prompt, chosen, rejected, tokens.boundary_mismatch, truncated=True)
    is_identical = cut.chosen_ids == cut.rejected_ids
    return Fitted(cut, DropReason.IDENTICAL_TRUNCATED if is_identical else None)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over what decides the ids of a text; the chat template has a digest of its own."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest([type(tokenizer).__name__, tokenizer.get_vocab(), special])
    description = json.loads(backend.to_str())
    # The last call's padding and truncation are remembered in the backend, and are no property of it.
    description.pop("padding", None)
    description.pop("truncation", None)
    return digest([description, special])


def with_system(prompt: Messages) -> Messages:
    """`prompt` with an empty system message first, unless it has one."""
    if prompt[0]["role"] == "system":
        return prompt
    return [{"role": "system", "content": ""}, *prompt]


def _end_of_sequence(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.eos_token:
        raise ModelError(
            "the tokenizer has no end-of-sequence token, which text completions need; set one in its "
            "tokenizer_config.json (eos_token)"
        )
    return str(tokenizer.eos_token)


def _encode(
    texts: list[list[str]], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool
) -> list[PairTokens]:
    if not texts:
        return []
    # One call for all: the fast tokenizers spread a batch over the cores.
    flat = [text for three in texts for text in three]
    ids: Any = tokenizer(
        flat, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
    )["input_ids"]
    return [_split(*ids[start : start + 3]) for start in range(0, len(flat), 3)]


def _split(prompt: list[int], prompt_chosen: list[int], prompt_rejected: list[int]) -> PairTokens:
    end = min(_shared_length(prompt, prompt_chosen), _shared_length(prompt, prompt_rejected))
    return PairTokens(prompt[:end], prompt_chosen[end:], prompt_rejected[end:], end < len(prompt))


def _shared_length(prompt: list[int], whole: list[int]) -> int:
    if whole[: len(prompt)] == prompt:
        return len(prompt)
    return next(
        (index for index, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole)
    )
