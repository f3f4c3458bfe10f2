"""Pairs with real length statistics and models of a 7B's proportions, for the speed benchmarks."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import DPOTrainer

REAL_PAIRS = Path(__file__).resolve().parents[2] / "shared" / "data" / "alpaca_pairs_train.jsonl.gz"
TOKENS_PER_WORD = 1.3
MAX_LENGTH = 1024


class TokenizedDPOTrainer(DPOTrainer):  # type: ignore[misc]
    """TRL's trainer on rows that are tokens already, as both sides get them; nothing else is changed."""

    def _prepare_dataset(self, dataset: Any, *others: Any) -> Any:
        return dataset


class Lengths(NamedTuple):
    """Tokens of one pair's parts."""

    prompt: int
    chosen: int
    rejected: int


# Deciles of words (0th, 10th ... 100th percentile) in 4,349 judged pairs of instruction answers, for
# machines that do not have the file.
PROMPT_DECILES = (2, 7, 10, 12, 14, 18, 22, 28, 38, 58, 351)
CHOSEN_DECILES = (1, 31, 63, 94, 136, 181, 222, 265, 329, 422, 1000)
REJECTED_DECILES = (1, 16, 33, 53, 73, 95, 129, 173, 217, 283, 1000)


def pair_lengths(count: int, seed: int = 0) -> list[Lengths]:
    """Lengths of `count` pairs: drawn from the real ones, or from their quantiles where those are absent."""
    real = list(_real_lengths()) if REAL_PAIRS.is_file() else []
    generator = np.random.default_rng(seed)
    if real:
        return [real[row] for row in generator.choice(len(real), size=count, replace=count > len(real))]
    tenths = np.arange(11) / 10
    words = [
        np.interp(generator.random(count), tenths, deciles)
        for deciles in (PROMPT_DECILES, CHOSEN_DECILES, REJECTED_DECILES)
    ]
    return [_clipped(*(float(part[row]) for part in words)) for row in range(count)]


def tokenized_pairs(count: int, vocabulary: int, seed: int = 0) -> Dataset:
    """Pairs of random tokens with real lengths, in TRL's tokenized columns, keyed by `pair_id`."""
    generator = np.random.default_rng(seed + 1)

    def tokens(length: int) -> list[int]:
        ids: list[int] = generator.integers(3, vocabulary, size=length).tolist()
        return ids

    lengths = pair_lengths(count, seed)
    return Dataset.from_dict(
        {
            "pair_id": [f"pair{row:06d}" for row in range(count)],
            "prompt_id": [f"prompt{row:06d}" for row in range(count)],
            "prompt_ids": [tokens(each.prompt) for each in lengths],
            "chosen_ids": [tokens(each.chosen) for each in lengths],
            "rejected_ids": [tokens(each.rejected) for each in lengths],
        }
    )


def small_model(seed: int = 0, **changes: Any) -> Qwen2ForCausalLM:
    """A Qwen2 of random weights whose head has a 7B model's share of the work (about a tenth)."""
    import torch

    torch.manual_seed(seed)
    config = {
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 704,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return Qwen2ForCausalLM(Qwen2Config(**{**config, **changes}))


def _real_lengths() -> Iterator[Lengths]:
    with gzip.open(REAL_PAIRS, "rt", encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            chosen, rejected = (row[side][-1]["content"] for side in ("chosen", "rejected"))
            yield _clipped(*(float(len(text.split())) for text in (row["prompt"], chosen, rejected)))


def _clipped(prompt: float, chosen: float, rejected: float) -> Lengths:
    def tokens(words: float, most: int) -> int:
        return int(min(max(1.0, round(words * TOKENS_PER_WORD)), most))

    # A chat template adds about 20 tokens to the prompt.
    prompt_tokens = tokens(prompt, 492) + 20
    room = MAX_LENGTH - prompt_tokens
    return Lengths(prompt_tokens, tokens(chosen, room), tokens(rejected, room))


def seven_billion() -> Qwen2ForCausalLM:
    """Qwen2.5-7B's shapes with random weights, in bfloat16 on the GPU."""
    import torch

    config = Qwen2Config(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32_768,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            return Qwen2ForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A stand-in that TRL's trainer can ask for a padding token; the pairs are tokens already."""
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "a": 3}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="a"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
