"""Which pairs a training really consumed, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from selective_dpo.core.identity import ids_digest


class ConsumedOrder(NamedTuple):
    """The verdict on one training's data order."""

    pairs: int
    """Pairs of the curriculum."""
    consumed: int
    """Rows that went through the model, all epochs, padding rows not counted."""
    repeated_to_fill: int
    """Rows that the data loader repeated so that the last batch of an epoch is full on every process."""
    expected_digest: str
    """SHA-256 of the curriculum's order, run through as often as was consumed."""
    consumed_digest: str
    """SHA-256 of the order consumed."""

    @property
    def matches(self) -> bool:
        """Whether the curriculum's order was consumed, from its beginning; part of an epoch will do."""
        return self.consumed > 0 and self.expected_digest == self.consumed_digest

    @property
    def epochs(self) -> float:
        """How often the curriculum was run through."""
        return self.consumed / self.pairs

    def to_json(self) -> dict[str, Any]:
        """For `order.json`."""
        return {**self._asdict(), "epochs": self.epochs, "matches": self.matches}


class OrderLog:
    """Collects the rows of each batch, in the order that optimizer steps see them.

    A data loader that deals batches to several processes completes the last round of an epoch with
    rows from the epoch's beginning. They are recognised, since an epoch has exactly P rows, and
    counted apart.
    """

    def __init__(self, order: Sequence[str]) -> None:
        self._order = list(order)
        self.start_training()

    def start_training(self) -> None:
        """Forget an earlier training."""
        self._epoch_rows = 0
        self._repeated = 0
        self._consumed: list[int] = []

    def start_epoch(self) -> None:
        """The data loader begins again."""
        self._epoch_rows = 0

    def add(self, positions: Sequence[int]) -> list[int]:
        """One global batch: positions in the curriculum's order, over all processes, rank by rank.

        Returns those of them that do not merely fill the batch.
        """
        # Once the epoch is complete (`start_epoch` has not been called since), rows only fill the batch.
        own = list(positions[: len(self._order) - self._epoch_rows])
        self._repeated += len(positions) - len(own)
        self._consumed += own
        self._epoch_rows += len(own)
        return own

    def result(self) -> ConsumedOrder:
        """Compare what was consumed with the curriculum's order, repeated per epoch."""
        ids = [self._order[position] for position in self._consumed]
        repetitions = -(-len(ids) // max(1, len(self._order)))
        expected = (self._order * repetitions)[: len(ids)]
        return ConsumedOrder(
            len(self._order), len(ids), self._repeated, ids_digest(expected), ids_digest(ids)
        )
