"""Pairs of similar length, grouped so that padding and passes together cost least."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def group_by_length(lengths_B: NDArray[np.int64], worth_a_pass: int) -> list[list[int]]:
    """Groups of pairs, the longest pairs first, that cost the fewest tokens: those of their padded rows, and
    `worth_a_pass` for each group.

    Shapes: lengths_B [B]. Numbers of pairs, rising in each group; together the groups hold each
    of 0..B-1 exactly once.
    """
    order = np.argsort(-lengths_B, kind="stable")
    # costs[n]: of the best grouping of the n longest; starts[n]: where its last group begins.
    costs, starts = [0], [0]
    for end in range(1, len(order) + 1):
        each = [
            costs[start] + worth_a_pass + (end - start) * int(lengths_B[order[start]]) for start in range(end)
        ]
        starts.append(int(np.argmin(each)))
        costs.append(each[starts[end]])
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.insert(0, sorted(order[starts[end] : end].tolist()))
        end = starts[end]
    return groups
