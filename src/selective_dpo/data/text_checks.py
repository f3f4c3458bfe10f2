"""What the texts of pairs show by themselves: degenerate answers, and preferences that contradict each other.

Texts are as in `pairs.parquet`: JSON of a text or of its messages.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    read: Callable[[], Iterable[pa.RecordBatch]], *, repetition: float, similar_prompts: float
) -> TextChecks:
    """Look at the texts of pairs; `read` gives them in batches with the columns `COLUMNS`, and does so again.

    Prompts are the same where their words are, in order, but for case; and where two pairs have the same two
    answers (but for case and white space), at `similar_prompts` shared words of all words of both prompts
    (Jaccard). Of the texts only digests are kept, but for the prompts of answers that come again.
    """
    ids, degenerate = list[str](), list[bool]()
    digests_P3 = array("Q")
    for pair_id, prompt, chosen, rejected in _texts(read()):
        ids.append(pair_id)
        degenerate.append(is_degenerate(chosen, rejected, repetition))
        texts = " ".join(_words(prompt)) or prompt, _folded(chosen), _folded(rejected)
        digests_P3.extend(map(_digest, texts))
    prompt_P, chosen_P, rejected_P = np.array(digests_P3, dtype=np.uint64).reshape(-1, 3).T
    prompts, group_P = np.unique(prompt_P, return_inverse=True)
    answers_P2 = np.sort(np.stack([chosen_P, rejected_P], axis=1), axis=1)
    candidates = _again(answers_P2, group_P)
    links = [
        (one, other)
        for alike in _prompts_of(read, candidates, group_P)
        for (one, words), (other, others) in combinations(alike.items(), 2)
        if len(words & others) >= similar_prompts * max(1, len(words | others))
    ]
    first, second = zip(*links, strict=True) if links else ((), ())
    labels = joined(np.arange(len(prompts)), first, second)
    is_contradicting_P = contradicting(labels[group_P], chosen_P, rejected_P)
    return TextChecks(ids, np.array(degenerate, dtype=np.bool_), is_contradicting_P)


def _again(answers_P2: NDArray[np.uint64], group_P: NDArray[np.intp]) -> dict[int, int]:
    """Rows whose two answers come under several prompts, with a number for the answers."""
    _, answers_P = np.unique(answers_P2, axis=0, return_inverse=True)
    pairs = np.unique(np.stack([answers_P.ravel(), group_P], axis=1), axis=0)[:, 0]
    several = np.flatnonzero(np.bincount(pairs, minlength=1) > 1)
    rows = np.flatnonzero(np.isin(answers_P.ravel(), several))
    return dict(zip(rows.tolist(), answers_P.ravel()[rows].tolist(), strict=True))


def _prompts_of(
    read: Callable[[], Iterable[pa.RecordBatch]], rows: Mapping[int, int], group_P: NDArray[np.intp]
) -> Iterable[dict[int, frozenset[str]]]:
    """For each two answers the words of the prompts that they come under."""
    found: dict[int, dict[int, frozenset[str]]] = {}
    for row, (_, prompt, _, _) in enumerate(_texts(read()) if rows else ()):
        if row in rows:
            found.setdefault(rows[row], {})[int(group_P[row])] = frozenset(_words(prompt))
    return found.values()


def _texts(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[str, str, str, str]]:
    for batch in batches:
        columns = (batch[name].to_pylist() for name in COLUMNS)
        for pair_id, *texts in zip(*columns, strict=True):
            prompt, chosen, rejected = map(plain_text, texts)
            yield pair_id, prompt, chosen, rejected


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _words(prompt: str) -> list[str]:
    return _WORDS.findall(_folded(prompt))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")
