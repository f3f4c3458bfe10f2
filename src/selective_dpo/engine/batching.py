"""Batches with a bounded number of tokens, from pairs of similar length."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def token_budget_batches(lengths_P: ArrayLike, tokens_per_batch: int) -> list[NDArray[np.int64]]:
    """Cut pairs into batches whose padded size stays within a budget.

    A pair costs two rows (chosen and rejected), each as long as its longer one, and every row of a
    batch is padded to the batch's longest: 2 * pairs * longest <= `tokens_per_batch`, unless a single
    pair is longer than that on its own. Longest batches come first, so that memory runs out at the
    beginning of the work or not at all.

    Shapes: lengths_P [P], tokens of the longer of prompt + chosen and prompt + rejected. The result is
    a list of arrays of row numbers that together hold each of 0..P-1 exactly once.
    """
    lengths = np.asarray(lengths_P, dtype=np.int64)
    by_length = np.argsort(-lengths, kind="stable")
    batches: list[NDArray[np.int64]] = []
    start = 0
    while start < len(by_length):
        longest = max(1, int(lengths[by_length[start]]))
        size = max(1, tokens_per_batch // (2 * longest))
        batches.append(by_length[start : start + size])
        start += size
    return batches
