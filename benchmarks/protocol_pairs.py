"""What `protocol.py` scores: pairs of real lengths with a preference that can be learned, and a model.

A word has a tone, a number drawn once. An answer has a style s, drawn from a standard normal distribution,
and its words are drawn with probabilities proportional to exp(s * tone). The annotator prefers the answer
of the higher style, with Bradley-Terry noise. So pairs are difficult that are short, close in style or
labelled against it. Lengths are those of real pairs (see `workload.pair_lengths`), taken evenly from short to
long; two pairs share a prompt.

The model has random weights, but its head holds the tone of each word along one direction, as a trained
model's head holds what its words have in common. Without it a few updates teach so small a model nothing.
"""

from __future__ import annotations

import copy
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, Qwen2Tokenizer

from workload import MAX_LENGTH, Lengths, pair_lengths, seven_billion, small_model

LETTERS = string.ascii_lowercase
WORDS = len(LETTERS) ** 2
VOCABULARY = 1024
"""More than there are tokens, as usual."""
PAIRS_PER_PROMPT = 2
ANNOTATOR_TEMPERATURE = 0.25
"""P(the first answer is preferred) = sigmoid((style of the first - style of the second) / this)."""
TONE_IN_HEAD = 0.6
"""How far the tone moves a word's row of the head, whose random part has a norm of 0.16. With this and the
annotator's noise two seeds share .975 of their easiest halves; on the authors' real records .967 to .984."""

FACTS = (
    "generated: lengths as in real pairs, words drawn by an answer's style, labels by the higher style with "
    "Bradley-Terry noise; see benchmarks/protocol_pairs.py"
)


class Start(NamedTuple):
    """What both sides begin with."""

    model: Path
    """Folder of the starting policy and its tokenizer; without weights where they are only in memory."""
    pairs: Path
    """JSON Lines of prompt, chosen and rejected."""
    load: Callable[[], Any]
    """The starting policy; each call gives one that may be trained."""
    in_memory: bool
    """Whether `load` is the only place to get it from."""
    weights: int
    """Parameters of the model."""


def make_start(folder: Path, *, pairs: int, longest: int, width: int, device: str) -> Start:
    """Write model, tokenizer and pairs below `folder`; on the GPU the model is a 7B's, in memory only.

    Prompts and answers are cut to `longest` tokens; `width` is the CPU model's hidden size.
    """
    generator = np.random.default_rng(0)
    tone_W = generator.normal(size=WORDS)
    model_folder, pairs_file = folder / "model", folder / "pairs.jsonl"
    pairs_file.write_text(_pairs(pairs, longest, tone_W, generator), "utf-8")
    _tokenizer().save_pretrained(model_folder)
    if device == "cuda":
        return _seven_billion(model_folder, pairs_file)
    model = _small(width, tone_W)
    model.save_pretrained(model_folder)
    return Start(
        model_folder,
        pairs_file,
        lambda: AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        in_memory=False,
        weights=model.num_parameters(),
    )


def _pairs(count: int, longest: int, tone_W: NDArray[np.float64], generator: np.random.Generator) -> str:
    prompt, lines = "", []
    for number, lengths in enumerate(_representative_lengths(count, generator)):
        if number % PAIRS_PER_PROMPT == 0:
            prompt = _text(min(lengths.prompt, longest), 0.0 * tone_W, generator)
        styles = generator.normal(size=2)
        likely = 1 / (1 + np.exp((styles[1] - styles[0]) / ANNOTATOR_TEMPERATURE))
        chosen, rejected = styles if generator.random() < likely else styles[::-1]
        # The end of an answer is a token, too.
        room = min(MAX_LENGTH - len(prompt) // 2, longest) - 1
        row = {
            "prompt": prompt,
            "chosen": _text(min(lengths.chosen - 1, room), chosen * tone_W, generator),
            "rejected": _text(min(lengths.rejected - 1, room), rejected * tone_W, generator),
        }
        lines.append(json.dumps(row) + "\n")
    return "".join(lines)


def _representative_lengths(count: int, generator: np.random.Generator) -> list[Lengths]:
    """Every 50th of many pairs in the order of their longer rows, shuffled.

    Padding is decided by the few longest pairs, of which a small random sample holds too many or too few.
    """
    many = sorted(pair_lengths(50 * count), key=lambda each: each.prompt + max(each.chosen, each.rejected))
    return [many[50 * place + 25] for place in generator.permutation(count)]


def _text(words: int, logits_W: NDArray[np.float64], generator: np.random.Generator) -> str:
    weights_W = np.exp(logits_W - logits_W.max())
    drawn = generator.choice(WORDS, size=max(1, words), p=weights_W / weights_W.sum())
    return "".join(_word(number) for number in drawn)


def _word(number: int) -> str:
    first, second = divmod(number, len(LETTERS))
    return LETTERS[first] + LETTERS[second].upper()


def _tokenizer() -> Qwen2Tokenizer:
    """One token a word, with nothing between words: a small letter joins the capital after it."""
    words = [_word(number) for number in range(WORDS)]
    symbols = ["<pad>", "<eos>", *words, *LETTERS, *LETTERS.upper()]
    merges: Any = [tuple(word) for word in words]  # pairs, though annotated as strings
    return Qwen2Tokenizer(
        vocab={symbol: token for token, symbol in enumerate(symbols)},
        merges=merges,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<pad>",
        bos_token=None,
    )


def _small(width: int, tone_W: NDArray[np.float64]) -> Any:
    model = small_model(
        vocab_size=VOCABULARY,
        hidden_size=width,
        # A 7B spends 2% of its FLOPs on attention's products at these lengths, and a narrow model of the same
        # proportions half of them. A wide MLP and a single head of half the width bring it to a fifth.
        intermediate_size=11 * width,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=width // 2,
        num_hidden_layers=2,
        bos_token_id=None,
        eos_token_id=1,
    )
    direction_H = torch.randn(width, generator=torch.Generator().manual_seed(1)) / width**0.5
    tone_W1 = torch.from_numpy(tone_W).float()[:, None]
    with torch.no_grad():
        # After the two special tokens.
        model.lm_head.weight[2 : 2 + WORDS] += TONE_IN_HEAD * tone_W1 * direction_H
    return model


def _seven_billion(model_folder: Path, pairs_file: Path) -> Start:
    model = seven_billion()
    model.config.save_pretrained(model_folder)
    weights = {id(weight): weight for weight in model.parameters()}
    return Start(
        model_folder,
        pairs_file,
        # Layers of its own around the same frozen weights: only adapters are trained there.
        lambda: copy.deepcopy(model, dict(weights)),
        in_memory=True,
        weights=model.num_parameters(),
    )
