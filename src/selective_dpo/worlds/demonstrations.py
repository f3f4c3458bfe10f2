"""Demonstrations for supervised fine-tuning: right answers, and hasty ones. Made in bulk with NumPy.

Shapes: D demonstrations, T positions, N operands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from selective_dpo.worlds.tasks import BASE, COLON, EQUALS, LETTERS, Digits, solve
from selective_dpo.worlds.tokenizer import BOS, EOS, PAD, SYMBOL_IDS

IGNORED = -100
"""Label of positions that carry no loss (PyTorch's `ignore_index`)."""


class Demonstrations(NamedTuple):
    """Token ids and labels, both [D, T] int64, padded on the right; labels only where the answer is."""

    input_ids_DT: NDArray[np.int64]
    labels_DT: NDArray[np.int64]


def draw_demonstrations(
    count: int,
    generator: np.random.Generator,
    *,
    operations: Sequence[str],
    lengths: Sequence[int],
    hasty_share: float,
) -> Demonstrations:
    """`count` independent demonstrations: "<bos> op : x1 .. xn = y1 .. yn <eos>".

    Operation and length are uniform. A share `hasty_share` of the answers has 1 or 2 symbols overwritten
    by random letters (which may happen to be the right ones); the length is never changed.
    """
    longest = max(lengths)
    width = 2 * longest + 5  # <bos> op : n operands = n answers <eos>
    input_ids = np.full((count, width), SYMBOL_IDS[PAD], dtype=np.int64)
    labels = np.full((count, width), IGNORED, dtype=np.int64)
    letter_ids = np.array([SYMBOL_IDS[letter] for letter in LETTERS], dtype=np.int64)
    operation_D: NDArray[np.int64] = generator.integers(len(operations), size=count)
    length_D: NDArray[np.int64] = generator.choice(np.asarray(lengths), size=count)
    hasty_D: NDArray[np.bool_] = generator.random(count) < hasty_share
    for index, operation in enumerate(operations):
        for length in sorted(set(lengths)):
            rows = np.flatnonzero((operation_D == index) & (length_D == length))
            operands = generator.integers(BASE, size=(len(rows), length))
            answers = solve(operation, operands)
            hasty = np.flatnonzero(hasty_D[rows])
            answers[hasty] = overwrite(answers[hasty], generator)
            head = [SYMBOL_IDS[BOS], SYMBOL_IDS[operation], SYMBOL_IDS[COLON]]
            text = np.concatenate(
                [
                    np.tile(head, (len(rows), 1)),
                    letter_ids[operands],
                    np.full((len(rows), 1), SYMBOL_IDS[EQUALS]),
                    letter_ids[answers],
                    np.full((len(rows), 1), SYMBOL_IDS[EOS]),
                ],
                axis=1,
            )
            first = len(head) + length + 1  # position of the answer's first letter
            input_ids[rows, : text.shape[1]] = text
            labels[rows, first : text.shape[1]] = text[:, first:]
    return Demonstrations(input_ids, labels)


def overwrite(digits_BN: Digits, generator: np.random.Generator) -> Digits:
    """A copy of `digits_BN` in which each row has 1 or 2 places (equally likely) set to random digits."""
    rows, size = digits_BN.shape
    # The rank of random numbers is a random order of the places: the first one or two are overwritten.
    order_BN = generator.random((rows, size)).argsort(axis=1).argsort(axis=1)
    places_B1 = generator.integers(1, 3, size=(rows, 1))
    random_BN = generator.integers(BASE, size=(rows, size))
    return np.where(order_BN < places_B1, random_BN, digits_BN)
