"""TRL's lists of numbers to log, kept right where batches are weighed, parted or run again.

TRL appends one number a pass, the mean over its pairs or tokens, and logs the mean of each list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

PAIR_MEANS = tuple(
    f"{kind}/{part}"
    for kind, parts in (
        ("rewards", ("chosen", "rejected", "accuracies", "margins")),
        ("logps", ("chosen", "rejected")),
    )
    for part in parts
)
"""What TRL logs as means over the pairs of a batch."""


class LoggedMeans:
    """The lists of a `DPOTrainer`'s training, and its count of tokens."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.start_update()

    def weigh(self, weight: float) -> None:
        """Weigh the last pass as its loss is.

        TRL's mean over passes of each one's mean then becomes the mean over the update's own pairs; a blank
        pair counts in it with 0.
        """
        for name in PAIR_MEANS:
            self._lists[name][-1] *= weight

    def start_update(self) -> None:
        """What is logged from here on belongs to the next update."""
        self._at_update = self._lengths()
        self._tokens = self._trainer._total_train_tokens
        self._at_batch = self._at_update

    def back_to_update(self) -> None:
        """Forget what was logged since the update began."""
        for name, values in self._lists.items():
            del values[self._at_update.get(name, 0) :]
        self._trainer._total_train_tokens = self._tokens

    def start_batch(self) -> None:
        """What is logged from here on belongs to the next batch."""
        self._at_batch = self._lengths()

    def join(self, pairs: Sequence[int]) -> None:
        """The batch was run in passes of so many pairs, each weighed: make one number of theirs."""
        share = np.array(pairs) / sum(pairs)
        for name, values in self._lists.items():
            start = self._at_batch.get(name, 0)
            own = values[start:]
            if len(own) == len(pairs):
                values[start:] = [float(sum(own) if name in PAIR_MEANS else share @ own)]

    @property
    def _lists(self) -> Any:
        return self._trainer._metrics["train"]

    def _lengths(self) -> dict[str, int]:
        return {name: len(values) for name, values in self._lists.items()}
