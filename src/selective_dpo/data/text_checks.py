"""What the texts of pairs show by themselves: degenerate answers, and preferences that contradict each other.

Texts are as in `pairs.parquet`: JSON of a text or of its messages.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from selective_dpo.stats.contradictions import contradicting, joined

WINDOW, SHORTEST = 1000, 200
"""Bytes that are compressed together, and the fewest of which the ratio says something."""

COLUMNS = ("pair_id", "prompt", "chosen", "rejected")

_WORDS = re.compile(r"\w+")


class TextChecks(NamedTuple):
    """Of each pair, in the order of `pair_ids`; [P] bool."""

    pair_ids: list[str]
    degenerate_P: NDArray[np.bool_]
    contradicting_P: NDArray[np.bool_]


def plain_text(text_json: str) -> str:
    """A text, or its messages' contents one after the other."""
    text = json.loads(text_json)
    if isinstance(text, str):
        return text
    return "\n".join(str(message.get("content") or "") for message in text)


def compression_ratio(text: str) -> float:
    """How many times shorter zlib makes the window of the text that repeats itself most; 0 if it is short.

    About 2 for prose, in whatever language, and 4 or more where words or lines come again and again. A ratio
    of whole texts marks loops in decoded speech (Radford et al. 2022, arXiv 2212.04356, section 4.5); here it
    is taken of windows of equal size, since longer texts compress better.
    """
    data = text.encode("utf-8", "replace")
    windows = (data[start : start + WINDOW] for start in range(0, len(data), WINDOW))
    return max(
        (len(each) / len(zlib.compress(each)) for each in windows if len(each) >= SHORTEST), default=0.0
    )


def is_degenerate(chosen: str, rejected: str, repetition: float) -> bool:
    """Whether an answer is blank or repeats itself, or both are the same but for case and white space."""
    same = _folded(chosen) == _folded(rejected)
    return same or any(
        not text.strip() or compression_ratio(text) >= repetition for text in (chosen, rejected)
    )


def check_texts(
    batches: Iterable[pa.RecordBatch], *, repetition: float, similar_prompts: float
) -> TextChecks:
    """Look at the texts of pairs, which come in batches with the columns `COLUMNS`.

    Prompts are the same where their words are, in order, but for case; and where two pairs have the same two
    answers (but for case and white space), at `similar_prompts` shared words of all words of both prompts
    (Jaccard). Of the texts only digests are kept, but for the prompts of answers that come again.
    """
    ids: list[str] = []
    degenerate: list[bool] = []
    digests: list[tuple[bytes, bytes, bytes]] = []
    seen: dict[tuple[bytes, ...], dict[bytes, frozenset[str]]] = {}
    for pair_id, prompt, chosen, rejected in _texts(batches):
        ids.append(pair_id)
        degenerate.append(is_degenerate(chosen, rejected, repetition))
        words = _WORDS.findall(_folded(prompt))
        row = _digest(" ".join(words) or prompt), _digest(_folded(chosen)), _digest(_folded(rejected))
        digests.append(row)
        seen.setdefault(tuple(sorted(row[1:])), {})[row[0]] = frozenset(words)
    prompts = sorted({row[0] for row in digests})
    place = {prompt: number for number, prompt in enumerate(prompts)}
    links = [
        (place[one], place[other])
        for alike in seen.values()
        for (one, words), (other, others) in combinations(alike.items(), 2)
        if len(words & others) >= similar_prompts * max(1, len(words | others))
    ]
    first, second = zip(*links, strict=True) if links else ((), ())
    group_P = joined([place[row[0]] for row in digests], first, second)
    chosen_P, rejected_P = (np.array([row[side] for row in digests], dtype="S16") for side in (1, 2))
    return TextChecks(ids, np.array(degenerate, dtype=np.bool_), contradicting(group_P, chosen_P, rejected_P))


def _texts(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[str, str, str, str]]:
    for batch in batches:
        columns = (batch[name].to_pylist() for name in COLUMNS)
        for pair_id, *texts in zip(*columns, strict=True):
            prompt, chosen, rejected = map(plain_text, texts)
            yield pair_id, prompt, chosen, rejected


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _digest(text: str) -> bytes:
    # Hex, since NumPy's byte strings lose zeros at their ends.
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).hexdigest().encode("ascii")
