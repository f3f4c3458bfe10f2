"""Answers sampled from a policy.

The answers come from the model's own distribution, at the temperature and nucleus of the recipe and
nothing else: what a model's `generation_config.json` adds (top-k, repetition penalty ...) is not applied,
since it would blur what training changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import numpy as np
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

from selective_dpo.config import GenerationConfig
from selective_dpo.data.templates import Conversation, render
from selective_dpo.data.tokenize import with_system
from selective_dpo.distributed.progress import Progress
from selective_dpo.errors import ConfigError, DataError, ModelError, RunawayTemplateError, TemplateError
from selective_dpo.identity import Text, require_unique
from selective_dpo.storage.digests import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encode = Callable[[Text], list[int]]
"""From a prompt to the token ids that the model continues."""


class Prompt(NamedTuple):
    """What a model is asked: the id that answers and verdicts are joined on, and the text."""

    prompt_id: str
    text: Text


class Answer(NamedTuple):
    """One sampled answer."""

    text: str
    tokens: int
    """Number of tokens generated, the one that ends the answer not counted."""
    ended: bool = True
    """Whether it ended by itself, and not because it had as many tokens as it may."""


Answers = Mapping[str, Sequence[Answer]]
"""prompt_id -> samples."""


class _Row(NamedTuple):
    prompt_id: str
    sample: int
    ids: list[int]


def choose_prompts(prompts: Sequence[Prompt], config: GenerationConfig) -> list[Prompt]:
    """`config.prompts` distinct prompts drawn with `config.seed`; all of them where there are fewer.

    The draw does not depend on the order of `prompts`; of several with one id, the first is used.
    """
    distinct: dict[str, Prompt] = {}
    for prompt in prompts:
        distinct.setdefault(prompt.prompt_id, prompt)
    ids = sorted(distinct)
    order = np.random.default_rng(config.seed).permutation(len(ids))
    return [distinct[ids[place]] for place in order[: config.prompts]]


def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    *,
    stream: str,
    encode: Encode | None = None,
) -> dict[str, tuple[Answer, ...]]:
    """`config.samples` answers to each prompt: prompt_id -> answers.

    `model` is a causal language model of transformers, adapted by PEFT or not, on any device. Its mode, its
    generation settings and the global random state are left as they were. Prompts of similar length share
    a left-padded batch. Each batch has its own seed, made of `config.seed`, `stream`, and the prompts and
    samples in it, so it does not depend on the batches before. `stream` (an arm's name) keeps arms
    independent: with common random numbers, equal models would always tie. `encode` replaces the default
    `encode_prompt`.

    Raises:
        ConfigError: samples or top_p have no effect at temperature 0.
        DataError: a prompt without tokens, or chat messages without a chat template.
        IdentityError: a prompt id stands twice.
        ModelError: prompt and answer together exceed the model's positions.
    """
    check_generation(config)
    require_unique([prompt.prompt_id for prompt in prompts], what="prompts to answer")
    rows = _rows(prompts, config, encode or (lambda text: encode_prompt(tokenizer, text)))
    if not rows:
        return {}
    longest, positions = len(rows[-1].ids), getattr(model.config, "max_position_embeddings", None)
    if positions is not None and longest + config.max_new_tokens > positions:
        raise ModelError(
            f"the longest prompt ({longest:,} tokens) and generation.max_new_tokens "
            f"({config.max_new_tokens:,}) exceed the model's {positions:,} positions; lower max_new_tokens"
        )
    end_ids = _end_ids(model, tokenizer, prompts)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(end_ids, default=0)
    sampling: dict[str, Any] = {"do_sample": False}
    if config.temperature > 0.0:
        # top_k: transformers' own default is 50.
        sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    settings = transformers.GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=config.max_new_tokens,
        eos_token_id=sorted(end_ids) or None,
        pad_token_id=int(pad_id),
        use_cache=True,
        **sampling,
    )
    answers: dict[str, dict[int, Answer]] = {prompt.prompt_id: {} for prompt in prompts}
    with _generating(model), Progress(len(rows), f"answers of {stream}", unit="answers") as progress:
        for start in range(0, len(rows), config.batch_size):
            batch = rows[start : start + config.batch_size]
            content = [config.seed, stream, [[row.prompt_id, row.sample] for row in batch]]
            torch.manual_seed(int(digest(content)[:15], 16))  # 60 bits: what torch takes without a sign
            for row, new_ids in zip(batch, _continue(model, batch, settings), strict=True):
                # After a row's end `generate` goes on with padding, which may be the end token itself.
                length = next(
                    (place for place, token in enumerate(new_ids) if token in end_ids), len(new_ids)
                )
                text = tokenizer.decode(
                    new_ids[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
                answers[row.prompt_id][row.sample] = Answer(str(text), length, length < len(new_ids))
            progress.advance(len(batch))
    return {
        prompt_id: tuple(samples[number] for number in range(config.samples))
        for prompt_id, samples in answers.items()
    }


def _rows(prompts: Sequence[Prompt], config: GenerationConfig, encode: Encode) -> list[_Row]:
    """One row an answer, shortest prompt first; an order that the order of `prompts` does not change."""
    rows = []
    for prompt in prompts:
        ids = list(encode(prompt.text))
        if not ids:
            raise DataError(f"prompt {prompt.prompt_id} has no tokens; leave it out of the test data")
        rows += [_Row(prompt.prompt_id, sample, ids) for sample in range(config.samples)]
    return sorted(rows, key=lambda row: (len(row.ids), row.prompt_id, row.sample))


def _end_ids(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> frozenset[int]:
    """Every token that ends an answer: the model's, the tokenizer's, and the template's end of turn."""
    configured: Any = model.generation_config.eos_token_id if model.generation_config else None
    ids = list(configured) if isinstance(configured, (list, tuple)) else [configured]
    ids.append(tokenizer.eos_token_id)
    if any(not isinstance(prompt.text, str) for prompt in prompts):
        ids.append(turn_end_id(tokenizer))
    return frozenset(int(token) for token in ids if token is not None)


@contextlib.contextmanager
def _generating(model: Any) -> Iterator[None]:
    """Evaluation mode, blank generation defaults and a random state of our own; all restored."""
    was_training = model.training
    # `generate` fills what we leave open from the model's defaults; a PEFT model holds them twice.
    holders: list[Any] = [model]
    if hasattr(model, "get_base_model"):
        holders.append(model.get_base_model())
    defaults = [holder.generation_config for holder in holders]
    devices = range(torch.cuda.device_count())  # `manual_seed` seeds all of them
    model.eval()
    for holder in holders:
        holder.generation_config = transformers.GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        for holder, default in zip(holders, defaults, strict=True):
            holder.generation_config = default
        model.train(was_training)


def _continue(model: Any, batch: Sequence[_Row], settings: transformers.GenerationConfig) -> list[list[int]]:
    """The new token ids of each row, padding included."""
    ids = [torch.tensor(row.ids, device=model.device) for row in batch]
    left: dict[str, Any] = {"batch_first": True, "padding_side": "left"}
    input_ids = pad_sequence(ids, padding_value=int(settings.pad_token_id), **left)
    attention_mask = pad_sequence([torch.ones_like(row) for row in ids], **left)
    output: Any = model.generate(
        input_ids=input_ids, attention_mask=attention_mask, generation_config=settings
    )
    new_ids: list[list[int]] = output[:, input_ids.shape[1] :].tolist()
    return new_ids


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


def check_generation(config: GenerationConfig) -> None:
    """Raise `ConfigError` where greedy decoding leaves an option without effect."""
    if config.temperature > 0.0:
        return
    if config.samples > 1:
        raise ConfigError("generation.samples above 1 has no effect at temperature 0: all would be the same")
    if config.top_p < 1.0:
        raise ConfigError("generation.top_p has no effect at temperature 0; leave it out")
