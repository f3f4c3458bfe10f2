"""Token ids are those that TRL makes, and each length limit does what it says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from selective_dpo.config import DataConfig, SourceConfig
from selective_dpo.data.adapters import DropReason, Pair, parse_row
from selective_dpo.data.templates import load_template
from selective_dpo.data.tokenize import PairTokens, fit_length, tokenize_pairs, tokenizer_digest
from selective_dpo.errors import ConfigError, ModelError
from tests.fixtures.tokenizers import BOS_ID, CHATML, END_ID, START_ID, byte_tokenizer


def text_pair(prompt: str, chosen: str, rejected: str) -> Pair:
    pair = parse_row({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert isinstance(pair, Pair)
    return pair


def chat_pair(prompt: str, chosen: str, rejected: str, system: str | None = None) -> Pair:
    start = [] if system is None else [{"role": "system", "content": system}]
    pair = parse_row(
        {
            "prompt": [*start, {"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
    )
    assert isinstance(pair, Pair)
    return pair


def tokens_of(pair: Pair, tokenizer: PreTrainedTokenizerBase, **options: Any) -> PairTokens:
    (tokens,) = tokenize_pairs([pair], tokenizer, **options)
    assert isinstance(tokens, PairTokens)
    return tokens


def ids(text: str) -> list[int]:
    return list(text.encode())


def test_text_gets_bos_and_end_by_hand() -> None:
    tokens = tokens_of(text_pair("ab", "c", "d<|im_end|>"), byte_tokenizer())
    assert tokens == PairTokens([BOS_ID, *ids("ab")], [*ids("c"), END_ID], [*ids("d"), END_ID])


def test_a_tokenizer_without_bos() -> None:
    tokens = tokens_of(text_pair("ab", "c", "d"), byte_tokenizer(bos=False))
    assert tokens.prompt_ids == ids("ab")


def test_a_conversation_by_hand() -> None:
    tokens = tokens_of(chat_pair("q", "a", "b"), byte_tokenizer())
    # No <s>: the template writes none, and nothing is added to what the template writes.
    prompt = [START_ID, *ids("user\nq"), END_ID, *ids("\n"), START_ID, *ids("assistant\n")]
    assert tokens == PairTokens(prompt, [*ids("a"), END_ID, *ids("\n")], [*ids("b"), END_ID, *ids("\n")])


def test_a_template_that_writes_bos_gives_one_bos() -> None:
    tokens = tokens_of(chat_pair("q", "a", "b"), byte_tokenizer(template="{{ bos_token }}" + CHATML))
    assert tokens.prompt_ids[:2] == [BOS_ID, START_ID]
    assert tokens.prompt_ids.count(BOS_ID) == 1


def test_the_empty_system_message() -> None:
    pair, own = chat_pair("q", "a", "b"), chat_pair("q", "a", "b", system="s")
    tokenizer = byte_tokenizer()
    without = tokens_of(pair, tokenizer)
    with_empty = tokens_of(pair, tokenizer, empty_system_message=True)
    empty_turn = [START_ID, *ids("system\n"), END_ID, *ids("\n")]
    assert with_empty.prompt_ids == empty_turn + without.prompt_ids
    assert with_empty.chosen_ids == without.chosen_ids
    assert tokens_of(own, tokenizer, empty_system_message=True) == tokens_of(own, tokenizer)
    no_system = byte_tokenizer(template="{{ messages[-1].content }}")
    with pytest.raises(ConfigError, match="has no effect"):
        tokenize_pairs([pair], no_system, empty_system_message=True)


def test_kinds_may_be_mixed_and_refusals_keep_their_place() -> None:
    template = "{% if messages[0].content == 'no' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    tokenizer = byte_tokenizer(template=template)
    pairs = [chat_pair("no", "a", "b"), text_pair("p", "c", "d"), chat_pair("q", "a", "b")]
    results = tokenize_pairs(pairs, tokenizer)
    assert results[0] is DropReason.TEMPLATE_REFUSES
    assert results[1:] == [tokens_of(pairs[1], tokenizer), tokens_of(pairs[2], tokenizer)]
    assert tokenize_pairs([], tokenizer) == []


def test_text_needs_an_end_of_sequence_token() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="end-of-sequence"):
        tokenize_pairs([text_pair("p", "a", "b")], tokenizer)


def test_a_generation_prompt_that_is_written_differently_is_a_mismatch() -> None:
    # The prompt alone ends with "assistant\n<think>"; with a completion there is no "<think>".
    template = CHATML.replace(
        "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}"
    )
    tokens = tokens_of(chat_pair("q", "a", "b"), byte_tokenizer(template=template))
    assert tokens.boundary_mismatch
    assert tokens._replace(boundary_mismatch=False) == tokens_of(chat_pair("q", "a", "b"), byte_tokenizer())


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Letters, and words of them that may reach over the end of a prompt."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=alphabet,
    )
    words = ["the sky is blue", "the sky isn't black", "what is the colour of skylight", "assistant user"]
    backend.train_from_iterator(words * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = CHATML
    return tokenizer


def test_tokens_that_merge_over_the_boundary_are_a_mismatch() -> None:
    tokens = tokens_of(text_pair("the sk", "y", "ip"), merging_tokenizer())
    assert tokens.boundary_mismatch
    # "the" and " sky": what both sequences share with the prompt's own tokens ends after "the".
    decoded = merging_tokenizer().decode
    assert decoded(tokens.prompt_ids) + decoded(tokens.chosen_ids) == "the sky</s>"


def tokens_of_trl(pairs: list[Pair], tokenizer: PreTrainedTokenizerBase) -> list[PairTokens]:
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    arguments = DPOConfig(max_length=None, use_cpu=True, report_to="none", bf16=False)
    dataset = DPOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, arguments, "train")
    return [PairTokens(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in dataset]


TEXTS = [
    ("the sky is", " blue", " black"),
    ("the sk", "y", "ip"),
    ("the sky is ", "blue", "blue sky"),
    ("é\0\n", "a</s>", "<|im_end|>"),
    ("what", "\n\nthe", " the sky "),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["bytes with bos", "bytes", "merging", "merging, gemma"])
@pytest.mark.parametrize("make", [text_pair, chat_pair], ids=["text", "chat"])
def test_ids_equal_those_of_trl(kind: str, make: Any) -> None:
    tokenizer: PreTrainedTokenizerBase = {
        "bytes with bos": lambda: byte_tokenizer(template="{{ bos_token }}" + CHATML),
        "bytes": lambda: byte_tokenizer(bos=False),
        "merging": merging_tokenizer,
        "merging, gemma": merging_tokenizer,
    }[kind]()
    if kind.endswith("gemma"):
        tokenizer.chat_template = load_template("gemma-system")
    pairs = [make(*texts) for texts in TEXTS]
    ours = [tokens_of(pair, tokenizer)._replace(boundary_mismatch=False) for pair in pairs]
    assert ours == tokens_of_trl(pairs, tokenizer)


_IDS = st.lists(st.integers(0, 3), max_size=6)


def config(overlong: str = "drop", max_length: int = 8, max_prompt_length: int = 4) -> DataConfig:
    return DataConfig.model_validate(
        {
            "train": [SourceConfig(path="x.jsonl")],
            "max_length": max_length,
            "max_prompt_length": max_prompt_length,
            "overlong": overlong,
        }
    )


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "drop"),
    [
        (4, 4, 3, None),  # 4 + 4 = 8 fits exactly.
        (4, 5, 3, DropReason.TOO_LONG),
        (4, 3, 5, DropReason.TOO_LONG),  # The longer completion counts, whichever it is.
        (5, 1, 2, DropReason.PROMPT_TOO_LONG),  # Although 5 + 2 = 7 would fit.
        (5, 9, 2, DropReason.PROMPT_TOO_LONG),
        (0, 1, 2, DropReason.EMPTY_PROMPT),
        (1, 0, 2, DropReason.EMPTY_COMPLETION),
        (1, 2, 2, DropReason.IDENTICAL),
    ],
)
def test_limits_that_drop(prompt: int, chosen: int, rejected: int, drop: DropReason | None) -> None:
    tokens = PairTokens([1] * prompt, [2] * chosen, [2] * rejected)
    assert fit_length(tokens, config()) == (tokens, drop)


def test_limits_that_truncate() -> None:
    limits = config("truncate")
    fits = PairTokens([1, 2, 3, 4, 5], [6, 7, 8], [9])  # 5 + 3 = 8: above max_prompt_length, and fits.
    assert fit_length(fits, limits) == (fits, None)
    long_prompt = PairTokens([1, 2, 3, 4, 5, 6], [7, 8, 9], [9])  # 9 > 8, so the last four are kept.
    assert fit_length(long_prompt, limits).tokens == PairTokens([3, 4, 5, 6], [7, 8, 9], [9], False, True)
    long_answer = PairTokens([1, 2, 3], [4] * 9, [5] * 2)  # 8 - 4 = 4 tokens of the answer are left.
    assert fit_length(long_answer, limits).tokens == PairTokens([1, 2, 3], [4] * 4, [5] * 2, False, True)
    late = PairTokens([1, 2, 3], [4, 4, 4, 4, 4, 5], [4, 4, 4, 4, 4, 6])
    assert fit_length(late, limits).drop is DropReason.IDENTICAL_TRUNCATED


@pytest.mark.parametrize(
    ("lengths", "kept"),
    [
        (
            (100, 1000, 300),
            (100, 512, 300),
        ),  # 1,100 > 1,024, and the prompt is short.
        ((20, 1200, 700), (20, 512, 512)),
        ((100, 300, 1000), (100, 300, 512)),
        ((600, 424, 5), (600, 424, 5)),  # 1,024 fits, however long its prompt is.
        ((600, 425, 5), (512, 425, 5)),  # 1,025 does not; with 512 of the prompt, 937 does.
        ((2000, 600, 513), (512, 512, 512)),
        ((400, 624, 624), (400, 624, 624)),
    ],
)
def test_truncation_is_trl_0_11_4s(lengths: tuple[int, int, int], kept: tuple[int, int, int]) -> None:
    prompt, chosen, rejected = (list(range(length)) for length in lengths)
    tokens = PairTokens(prompt, [-1, *chosen[1:]], rejected)
    cut = fit_length(tokens, config("truncate", 1024, 512))
    assert cut.drop is None
    expected = (prompt[-kept[0] :], tokens.chosen_ids[: kept[1]], rejected[: kept[2]])
    assert cut.tokens[:3] == expected
    assert cut.tokens.truncated == (kept != lengths)


@settings(deadline=None)
@given(_IDS, _IDS, _IDS, st.sampled_from(["drop", "truncate"]))
def test_what_is_kept_is_within_the_limits(
    prompt: list[int], chosen: list[int], rejected: list[int], overlong: str
) -> None:
    limits = config(overlong, max_length=5, max_prompt_length=2)
    fitted = fit_length(PairTokens(prompt, chosen, rejected), limits)
    if fitted.drop is None:
        tokens = fitted.tokens
        assert tokens.prompt_ids and tokens.chosen_ids and tokens.rejected_ids
        assert len(tokens.prompt_ids) + max(len(tokens.chosen_ids), len(tokens.rejected_ids)) <= 5
        assert tokens.chosen_ids != tokens.rejected_ids


def test_the_tokenizer_digest_follows_what_decides_ids() -> None:
    tokenizer = byte_tokenizer()
    before = tokenizer_digest(tokenizer)
    assert before == tokenizer_digest(byte_tokenizer(template=None))
    assert before != tokenizer_digest(byte_tokenizer(bos=False))
    assert before != tokenizer_digest(merging_tokenizer())
    tokenizer(["a", "bb"], padding=True, truncation=True, max_length=1)
    assert tokenizer_digest(tokenizer) == before
    tokenizer.eos_token = "<pad>"
    assert tokenizer_digest(tokenizer) != before
