"""Which pairs a training really consumed, in which order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from selective_dpo.artifacts import read_json, write_atomic
from selective_dpo.core.identity import ids_digest
from selective_dpo.errors import ArtifactError, IdentityError
from selective_dpo.training.checkpoints import is_count

STATE = "curriculum_order.json"
"""In a checkpoint: what was consumed before it."""


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
    unrecorded: int = 0
    """Rows consumed before a checkpoint that does not say which: one of another trainer. The other numbers
    and digests are about what came after it, where the curriculum had to be gone on with."""

    @property
    def matches(self) -> bool:
        """Whether the curriculum's order was consumed, from its beginning; part of an epoch will do."""
        return self.consumed > 0 and not self.unrecorded and self.expected_digest == self.consumed_digest

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
        self._goes_on = False
        self._repeated = 0
        self._unrecorded = 0
        self._consumed: list[int] = []

    def start_epoch(self) -> None:
        """The data loader begins again; after `read_state`, it goes on instead."""
        if not self._goes_on:
            self._epoch_rows = 0

    def add(self, positions: Sequence[int]) -> list[int]:
        """One global batch: positions in the curriculum's order, over all processes, rank by rank.

        Returns those of them that do not merely fill the batch.
        """
        self._goes_on = False
        # Once the epoch is complete (`start_epoch` has not been called since), rows only fill the batch.
        own = list(positions[: len(self._order) - self._epoch_rows])
        self._repeated += len(positions) - len(own)
        self._consumed += own
        self._epoch_rows += len(own)
        return own

    def write_state(self, folder: Path) -> None:
        """Write what was consumed so far into a checkpoint: positions in the curriculum's order."""
        state = {
            "curriculum": ids_digest(self._order),
            "unrecorded": self._unrecorded,
            "repeated_to_fill": self._repeated,
            "positions": self._consumed,
        }
        write_atomic(folder / STATE, json.dumps(state) + "\n")

    def read_state(self, folder: Path) -> None:
        """Go on from what was written into a checkpoint.

        Raises:
            ArtifactError: it is not there, or something else.
            IdentityError: it is of another curriculum.
        """
        path = folder / STATE
        state = read_json(path)
        positions, numbers = state.get("positions"), [state.get("unrecorded"), state.get("repeated_to_fill")]
        if not isinstance(positions, list) or not all(map(is_count, [*numbers, *positions])):
            raise ArtifactError(f"{path} does not hold what a training writes; go on from another checkpoint")
        own, other = ids_digest(self._order), state.get("curriculum")
        if other != own or max(positions, default=0) >= len(self._order):
            raise IdentityError(
                f"{path} is of a training on another curriculum (the digest of its order is "
                f"{str(other)[:12]}, here {own[:12]}): go on with that one, or begin anew"
            )
        self._consumed, self._repeated = positions, state["repeated_to_fill"]
        self._go_on_after(state["unrecorded"])

    def go_on_after(self, updates: int, *, rows_in_batch: int, batches: int) -> None:
        """Go on after so many updates of which nobody knows what they consumed.

        Args:
            rows_in_batch: on all processes.
            batches: of an update.
        """
        rows = len(self._order)
        in_epoch = -(-rows // (rows_in_batch * batches))
        epochs, more = divmod(updates, in_epoch)
        self.start_training()
        self._go_on_after(epochs * rows + more * rows_in_batch * batches)

    def _go_on_after(self, unrecorded: int) -> None:
        self._unrecorded = unrecorded
        # After the last row of an epoch comes the first one of the next.
        self._epoch_rows = (unrecorded + len(self._consumed)) % len(self._order)
        self._goes_on = True

    def begin_epoch_again(self) -> None:
        """The resumed training does not skip what it has consumed of its epoch."""
        self._goes_on = False

    def result(self) -> ConsumedOrder:
        """Compare what was consumed with the curriculum's order, repeated per epoch."""
        ids = [self._order[position] for position in self._consumed]
        first = self._unrecorded % max(1, len(self._order))
        repetitions = -(-(first + len(ids)) // max(1, len(self._order)))
        expected = (self._order * repetitions)[first : first + len(ids)]
        return ConsumedOrder(
            len(self._order),
            len(ids),
            self._repeated,
            ids_digest(expected),
            ids_digest(ids),
            self._unrecorded,
        )
