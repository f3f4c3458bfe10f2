"""How many batches and updates a training makes, and how many padded tokens plain batches hold.

Plain batches are TRL's own: of b pairs 2b rows, chosen and rejected, all as long as the longest of them.
`dealing` has what this package's trainer makes of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Work(NamedTuple):
    """What a model computes on, padding included."""

    tokens: float
    squares: float
    """Each row's padded length squared, summed over rows: what attention costs by."""

    def times(self, factor: float) -> Work:
        """The same work, `factor` times."""
        return Work(self.tokens * factor, self.squares * factor)

    def plus(self, other: Work) -> Work:
        """This work and `other`."""
        return Work(self.tokens + other.tokens, self.squares + other.squares)


NO_WORK = Work(0.0, 0.0)


def padded_rows(rows: int, longest: int, *, multiple_of: int = 1) -> Work:
    """`rows` rows as long as the longest of them, rounded up to `multiple_of`."""
    width = max(1, math.ceil(longest / multiple_of)) * multiple_of
    return Work(float(rows * width), float(rows * width**2))


def total_work(parts: Iterable[Work]) -> Work:
    """All of `parts` together."""
    return functools.reduce(Work.plus, parts, NO_WORK)


class Epoch(NamedTuple):
    """The batches of one epoch, over all processes."""

    full: int
    rest: int
    """Pairs in the last, smaller batch; 0 if there is none."""


def epoch_batches(pairs: int, pairs_per_batch: int, processes: int) -> Epoch:
    """How a data loader deals `pairs` to `processes`.

    Alone, a process ends with what is left. Several get as many batches each, all of them full: the last
    round is completed with pairs from the epoch's beginning (accelerate's `even_batches`).
    """
    if processes == 1:
        return Epoch(*divmod(pairs, pairs_per_batch))
    rounds = math.ceil(math.ceil(pairs / pairs_per_batch) / processes)
    return Epoch(rounds * processes, 0)


def optimizer_steps(
    pairs: int, *, pairs_per_batch: int, accumulation: int, processes: int, epochs: float
) -> int:
    """Updates of a training: `accumulation` batches of every process make one, the last may have fewer."""
    epoch = epoch_batches(pairs, pairs_per_batch, processes)
    batches_per_process = (epoch.full + (epoch.rest > 0)) // processes
    return math.ceil(epochs * max(1, math.ceil(batches_per_process / accumulation)))


def sequential_work(lengths_P: NDArray[np.int64], pairs_per_batch: int, processes: int) -> Work:
    """One epoch of plain batches in the given order, exactly.

    Shapes: lengths_P [P], the longer row of each pair, in order.
    """
    epoch = epoch_batches(len(lengths_P), pairs_per_batch, processes)
    rows = epoch.full * pairs_per_batch + epoch.rest
    repeated = np.resize(lengths_P, rows)  # from the beginning again, where a last round is filled
    batches = (repeated[start : start + pairs_per_batch] for start in range(0, rows, pairs_per_batch))
    return total_work(padded_rows(2 * len(batch), int(batch.max())) for batch in batches)


def random_work(lengths_P: NDArray[np.int64], pairs: int, pairs_per_batch: int, processes: int) -> Work:
    """One epoch of plain batches over `pairs` of the P pairs, drawn and ordered at random: the expectation.

    Each batch then is a random subset of the P pairs. Shapes: lengths_P [P], each pair's longer row.
    """
    epoch = epoch_batches(pairs, pairs_per_batch, processes)
    work = NO_WORK
    for size, count in ((pairs_per_batch, epoch.full), (epoch.rest, int(epoch.rest > 0))):
        if count:
            # More pairs in a batch than there are: some stand in it twice, and it holds the longest.
            drawn = min(size, len(lengths_P))
            longest = expected_longest(lengths_P, drawn)
            longest_squared = expected_longest(lengths_P**2, drawn)
            work = work.plus(Work(2 * size * count * longest, 2 * size * count * longest_squared))
    return work


def expected_longest(values_P: NDArray[np.int64], size: int) -> float:
    """Mean over all subsets of `size` of the P values of the subset's largest.

    The i-th smallest value (from 0) is the largest of C(i, size - 1) of the C(P, size) subsets.
    """
    count = len(values_P)
    ranks = np.arange(count - 1, size - 1, -1)
    # C(i-1, s-1) / C(i, s-1) = (i - s + 1) / i, downwards from the largest's share, s / P.
    shares = size / count * np.cumprod(np.concatenate([[1.0], (ranks - size + 1) / np.maximum(ranks, 1)]))
    return float(shares @ np.sort(values_P)[::-1][: len(shares)])
