"""Which pairs a training really consumed, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from selective_dpo.core.identity import ids_digest

_STATE, _REPEATED = "order.parquet", b"repeated"


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

    def write_state(self, folder: Path) -> None:
        """Write what was consumed so far into a checkpoint: positions in the curriculum's order, int64."""
        table = pa.table({"position": pa.array(self._consumed, pa.int64())})
        facts = {_REPEATED: str(self._repeated).encode()}
        pq.write_table(table.replace_schema_metadata(facts), folder / _STATE)

    def read_state(self, folder: Path) -> None:
        """Go on from what was written into a checkpoint."""
        table = pq.read_table(folder / _STATE)
        self._consumed = table["position"].to_pylist()
        self._repeated = int(table.schema.metadata[_REPEATED])
        # After the last row of an epoch comes the first one of the next.
        self._epoch_rows = len(self._consumed) % len(self._order)

    def result(self) -> ConsumedOrder:
        """Compare what was consumed with the curriculum's order, repeated per epoch."""
        ids = [self._order[position] for position in self._consumed]
        repetitions = -(-len(ids) // max(1, len(self._order)))
        expected = (self._order * repetitions)[: len(ids)]
        return ConsumedOrder(
            len(self._order), len(ids), self._repeated, ids_digest(expected), ids_digest(ids)
        )
